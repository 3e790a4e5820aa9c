"""Fused blocks against the layers that they stand for, in double precision where that is possible."""

import collections
import contextlib
import copy
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import loss_after_200_steps, vary_norms
from processes import started
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

import convmixer
from convmixer import ConvMixer
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError
from convmixer.model import _say_plain
from convmixer.native import training as native
from convmixer.ops import dispatch, reference
from convmixer.ops.fused import cannot_compile

SHAPE = {"dim": 12, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": 7}
compiles = pytest.mark.skipif(cannot_compile() is not None, reason=str(cannot_compile()))
SMALL = {"depth": 1, "kernel_size": 3}  # compilers take their time


def pair(dtype=torch.float64, **changes) -> tuple[ConvMixer, ConvMixer]:
    """A model and its fused twin, with BatchNorm statistics that are not the initial ones."""
    plain = ConvMixer(**{**SHAPE, **changes}, dtype=dtype)
    vary_norms(plain)
    twin = copy.deepcopy(plain)
    twin.set_fused()
    return plain, twin


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x).double()
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(ours, theirs, tolerance=1e-10):
    assert len(ours) == len(theirs) > 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype, i
        assert (a - b).double().norm() <= tolerance * (1 + b.double().norm()), i


def set_momentum(model: nn.Module, momentum: float | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def kept(model: nn.Module, x: torch.Tensor, run=None) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out; as in benchmarks/train_step.py."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x) if run is None else run(x)
        loss = y.float().sum()
    loss.backward()
    return sum(storages.values())


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ({}, (3, 3, 13, 11)),
        ({"kernel_size": 4}, (2, 3, 9, 12)),
        ({"kernel_size": 9}, (2, 3, 5, 7)),
        ({"kernel_size": 8, "patch_size": 1}, (1, 3, 3, 20)),
        ({"act_layer": "relu"}, (1, 3, 8, 38)),
        ({"act_layer": "identity", "kernel_size": 1, "in_chans": 2}, (2, 2, 6, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_steps(shape, size, layout, momentum):
    plain, fused = pair(**shape)
    for model in (plain, fused):
        model.to(memory_format=layout)
        set_momentum(model, momentum)
    for _ in range(3):
        x = torch.randn(size, dtype=torch.float64).to(memory_format=layout)
        assert_equal(gradients(fused, x), gradients(plain, x))
        for model in (plain, fused):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))
    for model in (plain, fused):
        model.eval()
    assert fused.forward_features(x).is_contiguous(memory_format=layout)
    assert_equal(gradients(fused, x), gradients(plain, x))
    with torch.no_grad():
        assert_equal([fused(x)], [plain(x)])
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


def test_groups_of_images(monkeypatch):
    """Large feature maps are computed in parts."""
    monkeypatch.setattr(reference, "_PART", 500)
    plain, fused = pair()
    x = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    assert_equal(gradients(fused, x), gradients(plain, x))
    with torch.no_grad():
        assert_equal([fused.eval()(x)], [plain.eval()(x)])


@pytest.mark.parametrize("grad", [True, False])
def test_each_batchnorm_has_its_own_mode(grad):
    plain, fused = pair()
    for model in (plain, fused):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for i in (0, 2, 3, 5):
            norms[i].eval()
        norms[4].track_running_stats = False
        norms[4].running_mean = norms[4].running_var = norms[4].num_batches_tracked = None
        norms[6].weight = norms[6].bias = None
        norms[1].track_running_stats = norms[5].track_running_stats = False  # and the statistics stay where they are
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    if grad:
        assert_equal(gradients(fused, x), gradients(plain, x))
    else:
        with torch.no_grad():
            assert_equal([fused(x)], [plain(x)])
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


@pytest.mark.parametrize("frozen", ["stem", "blocks.1", "blocks.0.0.fn.0.weight", "blocks.2.1.bias", ""])
def test_frozen_parameters(frozen):
    plain, fused = pair()
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) if frozen else name.startswith("head"))
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    for model in (plain, fused):
        model(x).square().sum().backward()
    assert_equal(*[[p.grad for p in model.parameters() if p.requires_grad] for model in (fused, plain)])


def test_statistics_far_from_zero():
    """Sums of squares lose what BatchNorm needs; sums relative to about the mean do not, whatever was seen before."""
    plain, fused = pair(torch.float32, act_layer="identity", kernel_size=1)
    for model in (plain, fused):
        model.stem[0].bias.data += 3000.0
        model.stem[2].bias.data += 3000.0  # for the depthwise convolution
        model.blocks[0][0].fn[2].bias.data -= 1000.0  # for the pointwise one
    x = torch.randn(8, 3, 16, 16)
    assert_equal([fused(x)], [plain.double()(x.double()).float()], 1e-3)


@pytest.mark.parametrize(
    "backend", [None, *(pytest.param(b, marks=compiles) for b in ("aot_eager", "inductor"))], ids=str
)
def test_bfloat16_autocast_is_as_good_as_the_layers(backend):
    torch._dynamo.reset()
    exact, fused = pair(**(SMALL if backend else {}))
    x = torch.randn(8, 3, 24, 24, dtype=torch.float64)
    expected = gradients(exact, x)
    plain, fused, x = copy.deepcopy(exact).float(), fused.float(), x.float()
    run = torch.compile(fused, fullgraph=True, dynamic=False, backend=backend) if backend else fused
    errors = []
    for model, call in ((fused, run), (plain, plain)):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(call, x)
            assert model.forward_features(x).dtype == torch.bfloat16
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    (ours, theirs), sizes = map(torch.tensor, errors), [t.ndim for t in expected]
    weights = torch.tensor(sizes) > 1
    assert ours[weights].mean() <= 1.2 * theirs[weights].mean()
    # Gradients of vectors are small differences of large sums, of which one more is rounded.
    assert (ours <= 3 * theirs + 0.05).all()


def test_scaled_losses_scale_the_gradients():
    _, fused = pair(torch.float32)
    x = torch.randn(4, 3, 16, 16)
    found = []
    for scale in (1.0, 2.0**12):
        fused.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = fused(x).float().square().mean()
        (loss * scale).backward()
        found.append([p.grad / scale for p in fused.parameters()])
    assert_equal(*found, 1e-6)


def test_200_steps_end_at_the_same_loss():
    losses = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = ConvMixer(16, 2, 3, 1, in_chans=1, num_classes=10)
        model.set_fused(fused)
        losses.append(loss_after_200_steps(model, bfloat16=fused))  # in float32 losses vary less
    assert losses[1] == pytest.approx(losses[0], abs=0.03)
    assert losses[0] < 0.8


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["eager", pytest.param("compiled", marks=compiles), "checkpointing"])
def test_less_than_half_of_the_activations_are_kept(run):
    shape = {"dim": 64, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": 10}
    fused, theirs = ConvMixer(**shape), TimmConvMixer(**shape)
    fused.set_fused()
    x = torch.randn(16, 3, 32, 32)
    limit, forward = 0.45, None
    if run == "compiled":
        torch._dynamo.reset()
        forward = torch.compile(fused, backend="aot_eager", dynamic=False)
    elif run == "checkpointing":
        fused.set_grad_checkpointing()
        limit = 0.25
    assert kept(fused, x, forward) <= limit * kept(theirs, x)


# ---- everything else a model is used for ----------------------------------------------------------------------------


def test_on_and_off_and_on():
    plain, fused = pair()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for enable in (False, True):
        fused.set_fused(enable)
        assert fused.fused is enable
        assert_equal(gradients(fused, x), gradients(plain, x))
    plain.load_state_dict(fused.state_dict())
    again = pickle.loads(pickle.dumps(fused))
    assert again.fused
    assert torch.equal(again.eval()(x), fused.eval()(x))


def test_create_model():
    model = convmixer.create_model("convmixer_256_8", device="cpu", fused=True, depth=1, dim=8)
    assert model.fused
    backbone = convmixer.create_model(
        "convmixer_256_8", device="cpu", fused=True, features_only=True, out_indices=(0, 2), depth=4, dim=8
    )
    assert backbone.model.fused
    plain = copy.deepcopy(backbone)
    plain.model.set_fused(False)
    x = torch.randn(2, 3, 16, 16)
    assert_equal(backbone(x), plain(x), 1e-5)
    with pytest.raises(ArgumentError, match=r"block_drop_rate=0\.1, and fused blocks have no dropout"):
        convmixer.create_model("convmixer_256_8", device="cpu", fused=True, block_drop_rate=0.1)


@pytest.mark.parametrize("options", [{}, {"stop_early": True}, {"output_fmt": "NHWC"}, {"intermediates_only": True}])
@pytest.mark.parametrize("mode", [True, False])
def test_intermediates(options, mode):
    plain, fused = pair(depth=4)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = [model.train(mode).forward_intermediates(x, [-2, 0], **options) for model in (fused, plain)]
    if not options.get("intermediates_only"):
        assert_equal([found[0][0]], [found[1][0]])
        found = [intermediates for _, intermediates in found]
    assert_equal(*found)
    with torch.no_grad():
        assert_equal(fused.forward_intermediates(x)[1], plain.forward_intermediates(x)[1])


def test_checkpointing_changes_nothing():
    plain, fused = pair()
    fused.set_grad_checkpointing()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_equal(gradients(fused, x), gradients(plain, x))
    # The layers move their running statistics again as they are computed anew; fused blocks do it once.
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


class Recorder:
    """A backend that counts the calls in the graphs which it compiles, inner ones too."""

    def __init__(self, backend="aot_eager"):
        self.calls, self.backend = collections.Counter(), torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        for module in graph.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if node.op.startswith("call_"):
                    self.calls[getattr(node.target, "__name__", str(node.target))] += 1
        return self.backend(graph, inputs)


@compiles
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_what_is_compiled_is_fused(mode, checkpointing):
    """Without graph breaks, and in every version of PyTorch."""
    torch._dynamo.reset()
    plain, fused = pair(**SMALL)
    plain.train(mode)
    fused.train(mode).set_grad_checkpointing(checkpointing)
    x = torch.randn(3, 3, 12, 15, dtype=torch.float64)
    layers, blocks = Recorder("eager"), Recorder()
    torch.compile(copy.deepcopy(plain), fullgraph=True, backend=layers)(x)
    assert layers.calls["batch_norm"] == 3
    compiled = torch.compile(fused, fullgraph=True, backend=blocks)
    assert_equal(gradients(compiled, x), gradients(plain, x))
    # In training the sums of the stem, and each BatchNorm of sums; two functions for the block; the last BatchNorm.
    assert blocks.calls["autograd_function_apply"] == mode * (1 + 3) + 2 + 1
    if not mode:
        with torch.no_grad():
            assert_equal([compiled(x)], [plain(x)])
    assert blocks.calls["batch_norm"] == 0
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


@compiles
def test_a_shared_batchnorm_counts_each_use():
    """Compiled, an update of a tensor that a list holds twice would be lost."""
    plain, fused = pair(depth=2, kernel_size=3)
    for model in (plain, fused):
        model.train()
        model.blocks[1][3] = model.blocks[0][3]
    torch._dynamo.reset()
    x = torch.randn(3, 3, 12, 15, dtype=torch.float64)
    assert_equal(gradients(torch.compile(fused, backend="aot_eager"), x), gradients(plain, x))
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


COMPILED = [
    *(
        (backend, checkpointing, momentum)
        for backend in ("eager", "aot_eager")
        for checkpointing in (False, True)
        for momentum in (0.1, None)
    ),
    ("inductor", False, 0.1),
    ("inductor", True, None),
]


@compiles
@pytest.mark.parametrize(("backend", "checkpointing", "momentum"), COMPILED)
def test_compiled_training_steps(backend, checkpointing, momentum):
    """Running statistics move in the forward pass, and no gradient notices."""
    torch._dynamo.reset()
    plain, fused = pair(**SMALL)
    fused.set_grad_checkpointing(checkpointing)
    for model in (plain, fused):
        set_momentum(model, momentum)
    compiled = torch.compile(fused, fullgraph=True, dynamic=False, backend=backend)
    for _ in range(2):
        x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
        assert_equal(gradients(compiled, x), gradients(plain, x))
        for model in (plain, fused):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=compiles)], ids=str)
def test_two_forward_passes_before_a_backward_pass(backend):
    torch._dynamo.reset()
    plain, fused = pair(**SMALL)
    run = torch.compile(fused, fullgraph=True, backend=backend) if backend else fused
    first, second = torch.randn(2, 3, 3, 12, 12, dtype=torch.float64)
    for model in (run, plain):
        one, two = model(first), model(second)
        (one.square().sum() + two.sum()).backward()
    assert_equal([p.grad for p in fused.parameters()], [p.grad for p in plain.parameters()])


@compiles
def test_compiled_in_a_checkpoint_of_the_caller():
    torch._dynamo.reset()
    plain, fused = pair(**SMALL)

    def forward(x):
        return torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)

    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    forward = torch.compile(forward, backend="aot_eager")
    forward(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_equal([p.grad for p in fused.parameters()], [p.grad for p in plain.parameters()])


@compiles
def test_hooks_are_found_while_compiling():
    torch._dynamo.reset()
    _, fused = pair()
    compiled = torch.compile(fused, backend="eager")
    fused.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(Exception, match=r"blocks\.1 has hooks"):
        compiled(torch.randn(2, 3, 12, 12, dtype=torch.float64))


def test_traced_scripted_and_exported_models_have_the_plain_layers(caplog):
    caplog.set_level(logging.INFO, "convmixer")
    _say_plain.cache_clear()
    plain, fused = pair(torch.float32, depth=1)
    plain.eval()
    fused.eval()
    x = torch.randn(2, 3, 12, 12)
    made = [
        torch.jit.script(fused),
        torch.jit.trace(fused, x),
        torch.fx.symbolic_trace(fused),
        torch.export.export(fused, (x,), strict=False).module(),  # as newer versions do by themselves
    ]
    for model in made:
        assert torch.equal(model(x), plain(x))
    assert "batch_norm" in str(torch.export.export(fused, (x,), strict=False).graph)
    if not cannot_compile():  # strict, it goes through the compiler
        assert "batch_norm" in str(torch.export.export(fused, (x,), strict=True).graph)
    recorders = ("torch.jit.script", "torch.jit.trace", "torch.fx", "torch.export")
    said = [f"fused blocks: off in what {name} makes, which sees the plain layers" for name in recorders]
    assert [record.getMessage() for record in caplog.records if record.name == "convmixer.model"] == said


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_functional_gradients(mode):
    plain, fused = pair()
    plain.train(mode)
    fused.train(mode)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)

    def loss(parameters):
        return torch.func.functional_call(fused, parameters, (x,)).square().sum()

    with pytest.raises(ConvMixerError, match=r"no forward-mode derivatives \(jvp, jacfwd\): set_fused\(False\)"):
        torch.func.jvp(fused, (x,), (x,))
    found = torch.func.grad(loss)(dict(fused.named_parameters()))
    plain(x).square().sum().backward()
    assert_equal(list(found.values()), [p.grad for p in plain.parameters()])
    # As torch.func does not let the layers move their running statistics, this has no other counterpart.
    assert_equal(list(fused.state_dict().values()), list(plain.state_dict().values()))


def test_second_derivatives_are_refused():
    _, fused = pair()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(ConvMixerError, match=r"only first derivatives: for second ones, .* set_fused\(False\)"):
        grad.sum().backward()


PROCESS = """
import sys, torch
import torch.distributed as dist
from torch import nn
sys.path[:0] = sys.argv[4:]
from test_fused import gradients, pair
rank, world = int(sys.argv[2]), 2
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/group", rank=rank, world_size=world)
torch.manual_seed(0)
plain, fused = pair()
fused.set_fused(sync_batchnorm=True)
learner = nn.parallel.DistributedDataParallel(fused)
if sys.argv[3] == "compiled":
    learner = torch.compile(learner, backend="aot_eager")
for _ in range(2):
    x, t = torch.randn(5, 3, 12, 12).double(), torch.randn(5, 7).double()
    mine = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal shares
    plain.zero_grad()
    fused.zero_grad()
    (plain(x) * t).sum().backward()
    (learner(x[mine]) * t[mine]).sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(world * a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=[pytest.mark.slow, compiles])])
def test_synchronised_batchnorm_in_two_processes(tmp_path, how):
    """Two processes compute what one does with all images, on CPUs too."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    rest = [how, *map(str, Path(__file__).parents[:2])]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(started([*command, rank, *rest], stderr=subprocess.PIPE)) for rank in (0, 1)]
        for process in both:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors


# ---- what cannot be fused -------------------------------------------------------------------------------------------


def _replace(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block_drop_rate": 0.1}, "block_drop_rate=0.1, and fused blocks have no dropout between them"),
        ({"drop_path_rate": 0.1}, "drop_path_rate is above 0, and fused blocks have no stochastic depth"),
        ({"act_layer": "silu"}, "stem.1 is a SiLU, not GELU or ReLU or Identity"),
        ({"act_layer": "gelu_tanh"}, "stem.1 is a"),
    ],
)
def test_models_that_cannot_be_fused(changes, text):
    model = ConvMixer(**SHAPE, **changes)
    with pytest.raises(ArgumentError, match=re.escape(f"this model cannot be fused: {text}")):
        model.set_fused()
    assert not model.fused


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: _replace(m, "blocks.1.3", nn.GroupNorm(2, 12)), "blocks.1.3 is a GroupNorm, not BatchNorm2d or"),
        (lambda m: _replace(m, "blocks.0.0.fn.1", nn.ReLU()), "its activations differ: GELU, ReLU"),
        (lambda m: _replace(m, "stem.1", nn.GELU("tanh")), "stem.1 is a GELU approximated by tanh"),
        (lambda m: _replace(m, "blocks.2.1", nn.Conv2d(12, 12, 1, bias=False)), "blocks.2.1 has no bias"),
        (
            lambda m: _replace(m, "blocks.2.1", nn.Conv2d(12, 12, 1, groups=2)),
            "blocks.2.1 is not a plain 1x1 convolution",
        ),
        (lambda m: m.blocks[1].append(nn.Identity()), "blocks.1 has 5 layers, not 4"),
        (lambda m: m.stem.register_forward_hook(lambda *_: None), "stem has hooks or a forward of its own"),
        (lambda m: m.blocks[2][0].fn[2].register_forward_pre_hook(lambda *_: None), "blocks.2.0.fn.2 has hooks"),
        (lambda m: setattr(m.blocks[0], "forward", lambda x: x), "blocks.0 has hooks or a forward of its own"),
        (lambda m: m.blocks.register_forward_hook(lambda *_: None), "blocks has hooks or a forward of its own"),
        (lambda m: m.block_drop.register_forward_hook(lambda *_: None), "block_drop has hooks or a forward of its own"),
        (
            lambda m: m.blocks[1][0].drop_path.register_forward_hook(lambda *_: None),
            "blocks.1.0.drop_path has hooks or a forward of its own",
        ),
    ],
)
def test_models_that_are_changed_later(change, text):
    model = ConvMixer(**SHAPE)
    model.set_fused()
    change(model)
    for call in (model, model.forward_intermediates):
        with pytest.raises(ArgumentError, match=re.escape(f"this model cannot be fused: {text}")):
            call(torch.randn(2, 3, 8, 8))


def test_one_value_per_channel():
    _, fused = pair()
    with pytest.raises(ValueError, match=r"more than 1 value per channel, and features of shape \(1, 12, 1, 1\)"):
        fused(torch.randn(1, 3, 2, 2, dtype=torch.float64))


@pytest.fixture
def gpu(monkeypatch):
    """What `set_fused` sees on a GPU, for new models: parameters there, Triton, a compute capability."""
    monkeypatch.setitem(sys.modules, "convmixer.ops.triton.launch", reference)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda"), raising=False)


def test_devices_and_types_without_kernels(monkeypatch):
    with pytest.raises(ConvMixerError, match="no fused blocks for 'mps' devices, only for cpu and cuda"):
        dispatch.check(torch.device("mps"), torch.float32, [5])
    monkeypatch.setitem(sys.modules, "convmixer.ops.triton.launch", None)
    with pytest.raises(DependencyError, match=r"fused blocks on a GPU need Triton .*pip install triton"):
        dispatch.check(torch.device("cuda"), torch.float32, [5])


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "size", "text"),
    [
        ((9, 0), None, torch.float64, 5, r"fused blocks on a GPU take .*torch.float16, not torch.float64"),
        ((7, 5), None, torch.float16, 5, r"no fused blocks for 'cuda', compute capability 7\.5: .* of at least 8\.0"),
        ((9, 4), "7.0", torch.float16, 5, "no fused blocks for 'cuda', .* this PyTorch is built for ROCm"),
        *(
            ((9, 0), None, torch.bfloat16, size, f"take kernels of 2 to 15, .*kernel_size={size}")
            for size in (1, 16, 18)
        ),
    ],
)
def test_what_the_kernels_do_not_take(gpu, monkeypatch, caplog, capability, hip, dtype, size, text):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    model = ConvMixer(**(SHAPE | {"kernel_size": size}), dtype=dtype)
    with pytest.raises(ConvMixerError, match=f"{text}.*set_fused\\(False\\)"):
        model.set_fused()
    caplog.set_level(logging.INFO, "convmixer")
    model.set_fused("auto")
    assert not model.fused
    (record,) = caplog.records
    assert re.search(f"fused='auto': off, .*{text}", record.getMessage())


def test_what_the_kernels_take(gpu):
    for size in (3, 11):
        model = ConvMixer(**(SHAPE | {"kernel_size": size}), dtype=torch.bfloat16)
        model.set_fused()
        assert model.fused


def test_auto_says_once_what_it_chose(caplog, request, monkeypatch):
    caplog.set_level(logging.INFO, "convmixer.model")
    monkeypatch.setattr(native, "_enabled", False)
    for changes in ({}, {"drop_path_rate": 0.1}):
        model = ConvMixer(**SHAPE, **changes)
        model.set_fused("auto")
        model(torch.randn(2, 3, 8, 8))
        assert not model.fused
    request.getfixturevalue("gpu")
    model = ConvMixer(**SHAPE)
    model.set_fused("auto")
    assert model.fused
    assert [record.getMessage() for record in caplog.records] == [
        "fused='auto': off, on cpu: set_native_training(False) was called",
        "fused='auto': off, this model cannot be fused: drop_path_rate is above 0, and fused blocks have no stochastic "
        "depth. set_fused(False) runs its layers one by one",
        "fused='auto': on, by Triton",
    ]


def test_switches_that_do_not_exist():
    model = ConvMixer(**SHAPE)
    with pytest.raises(ArgumentError, match="fused='yes'; valid: True, False, 'auto'"):
        model.set_fused("yes")
    for enable in (False, "auto"):
        with pytest.raises(ArgumentError, match="sync_batchnorm=True needs fused=True"):
            model.set_fused(enable, sync_batchnorm=True)
