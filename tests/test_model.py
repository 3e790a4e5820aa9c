"""The module against timm's, and everything that timm's interface promises."""

import re

import numpy as np
import pytest
import timm
import torch
from conftest import vary_norms
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer import ConvMixer
from convmixer.errors import ArgumentError, ImageError
from convmixer.model import ACTIVATIONS, GLOBAL_POOLS

# timm's own module warns of even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SHAPES = [
    {"dim": 24, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": 7},
    {"dim": 16, "depth": 2, "kernel_size": 9, "patch_size": 7, "num_classes": 5},
    {"dim": 16, "depth": 2, "kernel_size": 8, "patch_size": 1, "num_classes": 5},
    {"dim": 12, "depth": 1, "kernel_size": 4, "patch_size": 3, "num_classes": 5, "in_chans": 13},
    {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 2, "num_classes": 5, "in_chans": 1, "act_layer": nn.ReLU},
]


def make(**changes) -> ConvMixer:
    """A small model whose BatchNorm statistics are not the initial ones."""
    model = ConvMixer(**{**SHAPES[0], **changes})
    vary_norms(model)
    return model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_equals_timm(shape, mode):
    ours, theirs = make(**shape), TimmConvMixer(**shape)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.train(mode)
    theirs.train(mode)
    x = torch.randn(3, shape.get("in_chans", 3), 29, 23)
    assert close(ours(x), theirs(x))
    assert close(ours.forward_features(x), theirs.forward_features(x))
    assert close(ours.forward_head(ours.stem(x), pre_logits=True), theirs.forward_head(theirs.stem(x), pre_logits=True))
    for mine, other in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
        assert close(mine, other)


def test_gradients_equal_timm():
    ours, theirs = make(), TimmConvMixer(**SHAPES[0])
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 17, 17)
    for model in (ours, theirs):
        model(x).square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6, name


@pytest.mark.parametrize("in_chans", range(1, 14))
def test_any_number_of_channels(in_chans):
    assert make(in_chans=in_chans)(torch.randn(2, in_chans, 9, 9)).shape == (2, 7)


@pytest.mark.parametrize("kernel_size", range(1, 10))
@pytest.mark.parametrize("size", [(2, 2), (5, 31), (32, 17)])
def test_any_kernel_and_size(kernel_size, size):
    model = make(kernel_size=kernel_size)
    assert model.forward_features(torch.randn(2, 3, *size)).shape == (2, 24, size[0] // 2, size[1] // 2)


# ---- tracers, compilers, exporters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_torchscript(kernel_size):
    model = make(kernel_size=kernel_size, drop_path_rate=0.1, block_drop_rate=0.1).eval()
    x = torch.randn(2, 3, 15, 18)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_fx(mode):
    model = make().train(mode)
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 15, 18)
    assert torch.equal(graph(x), model(x))


def test_timm_feature_extractor_by_fx():
    model = make().eval()
    extractor = timm.models.create_feature_extractor(model, {"blocks.1": "features"})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(extractor(x)["features"], model.forward_intermediates(x, [1], intermediates_only=True)[0])


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_export_with_dynamic_shapes(kernel_size):
    model = make(kernel_size=kernel_size).eval()
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("half_height", min=4, max=64)
    dynamic = {"x": {0: batch, 2: 2 * height}}
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=dynamic).module()
    x = torch.randn(5, 3, 24, 16)
    assert close(program(x), model(x))


def test_export_in_training_mode():
    model = make()
    program = torch.export.export(model, (torch.randn(4, 3, 16, 16),)).module()
    x = torch.randn(4, 3, 16, 16)
    assert close(program(x), model(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_export_with_named_dimensions(channels_last):
    """The layout of tensors must not bind the height of images to their width."""
    model = ConvMixer(8, 2, 5, 2, num_classes=3).eval()
    model.channels_last = channels_last
    dims = [torch.export.Dim(name, min=8, max=512) for name in ("height", "width")]
    sizes = {0: torch.export.Dim("batch", max=64), 2: dims[0], 3: dims[1]}
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 40),), dynamic_shapes=(sizes,)).module()
    images = torch.randn(3, 3, 24, 64)
    assert torch.allclose(exported(images), model(images), atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_each_image(channels_last):
    """By vmap, as in differential privacy, against one image after the other."""
    model = ConvMixer(8, 2, 5, 2, num_classes=3).eval()
    model.channels_last = channels_last
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 1])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    for i in range(3):
        model.zero_grad()
        loss(dict(model.named_parameters()), images[i], labels[i]).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name][i], parameter.grad, atol=1e-6), name


def test_the_blocks_are_called_as_a_whole():
    """As timm's are: hooks, compile and FSDP work on `model.blocks`."""
    ours, theirs = ConvMixer(8, 2, 5, 2, num_classes=3), timm.models.convmixer.ConvMixer(8, 2, 5, 2, num_classes=3)
    for model in (ours, theirs):
        called = []
        model.blocks.register_forward_hook(lambda *_, called=called: called.append(1))
        model(torch.zeros(2, 3, 8, 8))
        assert called == [1]


def test_what_is_put_between_the_blocks_is_called():
    model, called = ConvMixer(8, 2, 5, 2, num_classes=3), []
    model.block_drop.register_forward_hook(lambda *_: called.append(1))
    model(torch.zeros(2, 3, 8, 8))
    assert called == [1, 1]
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    model.block_drop = nn.Identity()
    model.blocks = nn.ModuleList(model.blocks)
    assert torch.equal(model(x), expected)


def test_further_layers_of_a_layers_class():
    """As peft makes them for LoRA: a convolution to few channels, with all arguments of nn.Conv2d."""
    layer = ConvMixer(8, 1, 5, 2).blocks[0][0].fn[0]
    torch.manual_seed(0)
    reduced = type(layer)(8, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(8, 2, 5, padding=2, bias=False)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(reduced(x), plain(x))


def test_numbers_of_numpy():
    model = ConvMixer(np.int64(8), 2, np.int32(5), 2, num_classes=np.array([0, 4]).max() + 1, drop_rate=np.float32(0.5))
    assert type(model.num_classes) is type(model.dim) is int
    assert model.head_drop.p == 0.5
    model.reset_classifier(np.int64(3))
    assert type(model.num_classes) is int


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compile_without_graph_breaks(mode):
    torch._dynamo.reset()
    model, twin = make().train(mode), make().train(mode)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 15, 15)
    for m in (compiled, twin):
        m(x).square().mean().backward()
    assert close(compiled(x), twin(x))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    model = make(kernel_size=4).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    result = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert close(torch.from_numpy(result), model(x))


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(name):
    assert make(act_layer=name)(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_activation_names_mean_the_classes():
    x = torch.randn(2, 3, 8, 8)
    for name, cls in [("gelu", nn.GELU), ("relu", nn.ReLU), ("silu", nn.SiLU)]:
        torch.manual_seed(1)
        a = make(act_layer=name).eval()(x)
        torch.manual_seed(1)
        assert torch.equal(a, make(act_layer=cls).eval()(x))


@pytest.mark.parametrize("pool", GLOBAL_POOLS[:-1])
def test_pools(pool):
    model = make(global_pool=pool)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert model.head_hidden_size == model.head.in_features == (48 if "cat" in pool else 24)


@pytest.mark.parametrize("option", ["drop_rate", "block_drop_rate", "drop_path_rate"])
def test_dropout_acts_in_training_only(option):
    model = make(**{option: 0.5})
    x = torch.randn(4, 3, 12, 12)
    model.eval()
    assert torch.equal(model(x), model(x))
    for module in model.modules():  # BatchNorm alone would make training outputs repeatable
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert not torch.equal(model(x), model(x))
    assert list(model.state_dict()) == list(make().state_dict())


def test_block_dropout_is_before_every_block():
    model = make(block_drop_rate=0.5)
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(torch.randn(2, 3, 20, 20))
    assert all(0.4 < (x == 0).float().mean() < 0.6 for x in inputs)


def test_stochastic_depth_rises_linearly():
    model = make(depth=4, drop_path_rate=0.4)
    rates = [block[0].drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_device_and_dtype(dtype):
    model = ConvMixer(**SHAPES[0], device="meta", dtype=dtype)
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.is_meta and t.dtype == dtype for t in floats)
    assert model(torch.empty(2, 3, 8, 8, device="meta", dtype=dtype)).shape == (2, 7)


def test_activations_with_parameters_follow_device_and_type():
    model = ConvMixer(**SHAPES[0], act_layer="prelu", dtype=torch.float64)
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    model = ConvMixer(**SHAPES[0], act_layer="prelu", device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- timm's interface -----------------------------------------------------------------------------------------------


def test_intermediates():
    model = make(depth=4).eval()
    x = torch.randn(2, 3, 12, 12)
    last, every = model.forward_intermediates(x)
    assert len(every) == 4
    assert torch.equal(last, every[-1])
    assert torch.equal(last, model.forward_features(x))
    _, two = model.forward_intermediates(x, 2)
    assert torch.equal(two[0], every[2])
    _, some = model.forward_intermediates(x, [0, -2], norm=True)
    assert torch.equal(some[1], every[2])
    early, _ = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early, every[1])
    nhwc = model.forward_intermediates(x, [1], output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(nhwc[0].permute(0, 3, 1, 2), every[1])


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []])
def test_intermediates_that_do_not_exist(indices):
    with pytest.raises(ArgumentError, match=re.escape(f"indices={indices}")):
        make(depth=4).forward_intermediates(torch.randn(1, 3, 8, 8), indices)


def test_unknown_output_format():
    with pytest.raises(ArgumentError, match="unknown output_fmt 'NLC'; valid: NCHW, NHWC"):
        make().forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NLC")


def test_prune_intermediate_layers():
    model = make(depth=4).eval()
    x = torch.randn(2, 3, 12, 12)
    expected = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert len(model.blocks) == 3
    assert isinstance(model.head, nn.Identity)
    assert torch.equal(model(x), expected[1])
    kept = make(depth=4)
    kept.prune_intermediate_layers([1], prune_head=False)
    assert kept(x).shape == (2, 7)


def test_classifier():
    model = make()
    x = torch.randn(2, 3, 9, 9)
    assert model.get_classifier() is model.head
    model.reset_classifier(4)
    assert (model.num_classes, model(x).shape) == (4, (2, 4))
    model.reset_classifier(6, "catavgmax")
    assert (model.head_hidden_size, model(x).shape) == (48, (2, 6))
    assert model.global_pool.pool_type == "catavgmax"
    model.reset_classifier(0)
    assert model(x).shape == (2, 48)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 24, 4, 4)
    with pytest.raises(ArgumentError, match="a head needs a pool"):
        model.reset_classifier(3)
    model.to(torch.bfloat16).reset_classifier(3, "avg")
    assert model.head.weight.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing():
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    twin.set_grad_checkpointing()
    x = torch.randn(2, 3, 9, 9)
    for m in (model, twin):
        m(x).square().sum().backward()
    assert torch.equal(model(x), twin(x))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_group_matcher_covers_every_parameter():
    model = make()
    matcher = model.group_matcher()
    groups = timm.models.group_parameters(model, matcher)
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) == 1 + len(model.blocks) + 1  # stem, blocks, head
    assert model.no_weight_decay() == set()


def test_meta_model_takes_tensors_over():
    source = make()
    target = ConvMixer(**SHAPES[0], device="meta")
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(target.eval()(x), source.eval()(x))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 0}, "dim=0: give a whole number of at least 1"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"kernel_size": -1}, "kernel_size=-1"),
        ({"patch_size": True}, "patch_size=True"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_classes": -1}, "num_classes=-1: give a whole number of at least 0"),
        ({"drop_rate": 1}, "drop_rate=1: give a probability in [0, 1)"),
        ({"block_drop_rate": -0.1}, "block_drop_rate=-0.1"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate=nan"),
        ({"act_layer": "gleu"}, "unknown act_layer 'gleu'; did you mean"),
        ({"act_layer": 3}, "act_layer=3: give a name"),
        ({"global_pool": "mean"}, "unknown global_pool 'mean'"),
        ({"global_pool": ""}, "a head needs a pool"),
    ],
)
def test_senseless_arguments(changes, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        make(**changes)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 3, 1, 8), "image of 1x8 pixels is smaller than one 2x2 patch"),
        ((2, 3, 0, 0), "image of 0x0 pixels"),
        ((2, 4, 8, 8), "has 4 channels, this model takes in_chans=3. For other channel counts"),
        ((2, 8, 8, 3), "it looks channels-last"),
        ((3, 8, 8), "input of shape (3, 8, 8): a batch of images (B, 3, H, W) is needed"),
    ],
)
def test_inputs_that_do_not_fit(shape, text):
    model = make()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ImageError, match=re.escape(text)):
            call(torch.zeros(shape))
