"""The folded model against the original, which is the oracle throughout."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import vary_norms
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

import convmixer
from convmixer import ConvMixer, optimize
from convmixer.errors import ArgumentError, ImageError
from convmixer.model import ACTIVATIONS, GLOBAL_POOLS, Residual
from convmixer.runtime.folding import FoldedConvMixer

SMALL = {"dim": 12, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": 7}
# Scales of BatchNorm: none, too small for float32 to divide by, small, negative, large.
SCALES = (0.0, 1e-30, -1e-30, 1e-200, 1e-6, -1.0, 30.0)


def randomise(model: nn.Module, scales: tuple[float, ...] = SCALES) -> nn.Module:
    """Statistics and scales that training could have left, and some that it could hardly; evaluation mode."""
    vary_norms(model, std=0.5, variance=(0.01, 3), scale=(-1.5, 1.5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            places = torch.randperm(len(module.weight))[: len(scales)]
            module.weight.data[places] = torch.tensor(scales[: len(places)], dtype=module.weight.dtype)
        elif isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, -0.3)
    return model.eval()


def make(dtype: torch.dtype = torch.float64, scales: tuple[float, ...] = SCALES, **changes) -> ConvMixer:
    return randomise(ConvMixer(**{**SMALL, **changes}).to(dtype), scales)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest value of each image and channel (or class): a large channel does not hide a small one."""
    assert a.shape == b.shape
    dims = tuple(range(2, b.ndim))
    largest = b.abs().amax(dims, keepdim=True) if dims else b.abs().amax(1, keepdim=True)
    return float(((a - b).abs() / largest.clamp_min(torch.finfo(b.dtype).tiny)).max())


@torch.no_grad()
def check(model: ConvMixer, x: torch.Tensor, limit: float = 1e-10) -> None:
    folded = optimize(model)
    assert error(folded(x), model(x)) < limit
    assert error(folded.forward_features(x), model.forward_features(x)) < limit
    for a, b in zip(folded.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
        assert error(a, b) < limit


# ---- equal outputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", range(1, 10))
@pytest.mark.parametrize("size", [(2, 2), (3, 19), (8, 6), (20, 17)])
def test_kernels_and_sizes(kernel_size, size):
    check(make(kernel_size=kernel_size), torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("patch_size", [1, 3, 7])
@pytest.mark.parametrize("in_chans", [1, 2, 13])
def test_patches_and_channels(patch_size, in_chans):
    model = make(patch_size=patch_size, in_chans=in_chans, kernel_size=4)
    check(model, torch.randn(2, in_chans, 15, 9, dtype=torch.float64))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    check(make(act_layer=name), torch.randn(2, 3, 12, 12, dtype=torch.float64))


@pytest.mark.parametrize(  # a head needs a pool
    ("pool", "num_classes"), [(pool, n) for pool in GLOBAL_POOLS for n in (0, 7) if pool or not n]
)
def test_pools(pool, num_classes):
    model = make(global_pool=pool, num_classes=num_classes)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    check(model, x)
    folded, features = optimize(model), model.forward_features(x)
    assert torch.equal(folded.forward_head(features), model.forward_head(features))
    assert torch.equal(folded.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))


def test_rates_of_dropout_do_not_matter():
    check(make(drop_rate=0.5, block_drop_rate=0.5, drop_path_rate=0.5), torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("scales", [(), SCALES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_originals(scales, dtype):
    """Against float64, the folded model errs about as much as the original in the same type."""
    exact = make(scales=scales, dim=16)
    exact.load_state_dict({name: t.to(dtype).to(t.dtype) for name, t in exact.state_dict().items()})
    x = torch.randn(8, 3, 16, 16).to(dtype)
    low = copy.deepcopy(exact).to(dtype)
    truth = exact.forward_intermediates(x.double(), intermediates_only=True)
    ours = optimize(low).forward_intermediates(x, intermediates_only=True)
    theirs = low.forward_intermediates(x, intermediates_only=True)
    for a, b, t in zip(ours, theirs, truth, strict=True):
        a, b, t = (y.double().transpose(0, 1).flatten(1) for y in (a, b, t))  # (dim, the rest)
        error_a, error_b = ((y - t).norm(dim=1) / t.norm(dim=1) for y in (a, b))
        assert (error_a <= 2 * error_b + 2 * torch.finfo(dtype).eps).all()


@torch.no_grad()
def test_shipped_weights(cat):
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").eval()
    transform = convmixer.create_transform(model)
    files = [cat, cat.with_name("coffee.png"), cat.with_name("camera.png")]
    x = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    folded = optimize(model)
    assert error(folded(x), model(x)) < 1e-5
    ours, theirs = folded.forward_features(x), model.forward_features(x)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    model.double()
    assert error(optimize(model)(x.double()), model(x.double())) < 1e-10


# ---- backbones ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_intermediates():
    model = make(depth=4)
    folded, x = optimize(model), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for options in (
        {"indices": 2},
        {"indices": [-2, 0], "norm": True},
        {"indices": [1], "stop_early": True},
        {"indices": [1], "output_fmt": "NHWC"},
    ):
        (a, several), (b, expected) = (m.forward_intermediates(x, **options) for m in (folded, model))
        assert error(a, b) < 1e-10
        assert all(error(y, z) < 1e-10 for y, z in zip(several, expected, strict=True))
        intermediates = folded.forward_intermediates(x, **options, intermediates_only=True)
        assert all(torch.equal(y, z) for y, z in zip(several, intermediates, strict=True))


def test_truncated_backbones():
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model = make()
    model.prune_intermediate_layers([0, 1], prune_head=False)
    check(model, x)
    model.reset_classifier(4, "max")
    check(model, x)
    model.prune_intermediate_layers([0])
    check(model, x)


@torch.no_grad()
@pytest.mark.parametrize("normalization", [False, True])
def test_features_only(normalization):
    arguments = {"dim": 12, "depth": 4, "features_only": True, "out_indices": (0, 2), "device": "cpu"}
    backbone = randomise(convmixer.create_model("convmixer_256_8", **arguments, dtype=torch.float64))
    before = copy.deepcopy(backbone.state_dict())
    folded = optimize(backbone.train(), normalization=normalization)
    assert backbone.training
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert not folded.training
    assert folded.feature_info.channels() == [12, 12]
    assert isinstance(folded.model, FoldedConvMixer)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    mean, std = (images.new_tensor(backbone.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    x = (images - mean) / std
    for a, b in zip(folded(images if normalization else x), backbone.eval()(x), strict=True):
        assert error(a, b) < 1e-10
    assert folded.pretrained_cfg["mean"] == ((0.0,) * 3 if normalization else backbone.pretrained_cfg["mean"])


# ---- input normalisation, predict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
def test_normalization(in_chans, cat):
    model = convmixer.create_model("convmixer_256_8", pretrained=True, in_chans=in_chans, device="cpu")
    folded = optimize(model, normalization=True)
    transform = convmixer.create_transform(folded)
    pixels = transform(Image.open(cat).convert("RGB" if in_chans == 3 else "L"))
    assert (pixels.shape[0], 0 <= pixels.min() < pixels.max() <= 1) == (in_chans, True)
    expected = convmixer.predict(model, cat, topk=10)
    for twin in (optimize(model), folded):
        got = convmixer.predict(twin, cat, topk=10)
        assert [label for label, _ in got] == [label for label, _ in expected]
        assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=1e-5)


def test_normalization_without_preprocessing():
    with pytest.raises(ArgumentError, match="this ConvMixer says nothing about its preprocessing"):
        optimize(make(), normalization=True)


# ---- what the copy is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_original_stays_as_it_is(dtype):
    model = make(act_layer="prelu").train()
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    folded = optimize(model, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in folded.state_dict().values()}
    assert not shared


def test_no_batchnorm_and_no_gradient():
    folded = optimize(make())
    assert not [m for m in folded.modules() if "Norm" in type(m).__name__]
    assert not [p for p in folded.parameters() if p.requires_grad or p.grad is not None]
    program = torch.export.export(folded, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.conv2d.default" in operations
    assert not [name for name in operations if "norm" in name]


def test_interface():
    model = make(in_chans=4)
    model.pretrained_cfg = {"label_names": tuple("abcdefg")}
    folded = optimize(model)
    for name in ("num_features", "num_classes", "in_chans", "head_hidden_size", "pretrained_cfg", "feature_info"):
        assert getattr(folded, name) == getattr(model, name)
    assert torch.equal(folded.get_classifier().weight, model.head.weight)
    assert torch.equal(copy.deepcopy(folded).head.weight, model.head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(dtype):
    model = make(scales=())
    folded = optimize(model, dtype=dtype)
    assert {t.dtype for t in folded.state_dict().values()} == {dtype}
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert error(folded(x.to(dtype)).double(), model(x.double())) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_is_kept(channels_last, weights):
    model = make(dim=16).to(memory_format=weights)
    model.channels_last = channels_last
    folded = optimize(model)
    assert folded.stem[0].weight.stride() == model.stem[0].weight.stride()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    expected = model.forward_features(x)
    assert folded.forward_features(x).stride() == expected.stride()
    maps = folded.forward_intermediates(x, intermediates_only=True)
    assert {y.stride() for y in maps} == {expected.stride()}


def test_evaluation_mode_only():
    folded = optimize(make().train())
    assert not any(module.training for module in folded.modules())
    assert folded.eval() is folded
    with pytest.raises(ArgumentError, match="cannot be trained: train the original, then optimize it again"):
        folded.train()
    assert not folded.training


def test_gradients_with_respect_to_images():
    model = make(act_layer="relu", scales=())
    grads = []
    for m in (model, optimize(model)):
        x = torch.linspace(-1, 1, 3 * 64, dtype=torch.float64).reshape(1, 3, 8, 8).requires_grad_()
        m(x)[0, 0].backward()
        grads.append(x.grad)
    assert error(grads[1], grads[0]) < 1e-10


def test_threads():
    folded = optimize(make())
    images = [torch.randn(1, 3, size, 12, dtype=torch.float64) for size in (4, 8, 12, 16)] * 4
    expected = [folded(x) for x in images]
    with ThreadPoolExecutor(2) as threads:
        assert all(torch.equal(a, b) for a, b in zip(threads.map(folded, images), expected, strict=True))


# ---- tracers, compilers, exporters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_export_with_dynamic_shapes(kernel_size):
    folded = optimize(make(kernel_size=kernel_size))
    dynamic = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    example = torch.randn(2, 3, 14, 15, dtype=torch.float64)
    program = torch.export.export(folded, (example,), dynamic_shapes=dynamic).module()
    for shape in ((1, 3, 4, 5), (3, 3, 20, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        assert error(program(x), folded(x)) < 1e-12


def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    folded = optimize(make(kernel_size=4))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), folded(x)) < 1e-12


def test_fx_and_tracing():
    folded, x = optimize(make()), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert torch.equal(torch.fx.symbolic_trace(folded)(x), folded(x))
    assert torch.equal(torch.jit.trace(folded, x)(x), folded(x))


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    folded = optimize(make(torch.float32, kernel_size=4))
    file = tmp_path / "model.onnx"
    dynamic = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    options = {"dynamo": True, "opset_version": 18, "verbose": False, "dynamic_shapes": dynamic}
    torch.onnx.export(folded, (torch.randn(2, 3, 14, 15),), file, **options)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 4, 5), (3, 3, 20, 7)):
        x = torch.randn(shape)
        result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert error(result, folded(x)) < 1e-5


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_optimized():
    with pytest.raises(ArgumentError, match=r"cannot optimize a torch\.nn\.modules\.linear\.Linear, which is not a"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"\.runtime\.folding\.FoldedConvMixer, .* give a model of convmixer"):
        optimize(optimize(make()))
    with pytest.raises(ArgumentError, match=r"cannot optimize a builtins\.str"):
        optimize("convmixer_256_8")


class Adapted(nn.Module):
    """As adapters of other libraries are: they have the weight of the layer inside, and add to what it computes."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.extra = layer, nn.Conv2d(12, 12, 1)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.extra(x)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Scaled(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.fn(x)


REPLACED = {
    "a scaled residual": ("blocks.1.0", Scaled(nn.Sequential(*[nn.Identity()] * 3)), "not the residual of a ConvMixer"),
    "no norm in the stem": ("stem", nn.Sequential(nn.Conv2d(3, 12, 2, 2), nn.GELU()), "not the stem of a ConvMixer"),
    "a dilated kernel": ("blocks.1.0.fn.0", nn.Conv2d(12, 12, 5, padding=4, dilation=2, groups=12), "dilation=(2, 2)"),
    "a circular kernel": (
        "blocks.1.0.fn.0",
        nn.Conv2d(12, 12, 5, padding=2, groups=12, padding_mode="circular"),
        "padding_mode='circular' instead of 'zeros'",
    ),
    "an adapter": ("blocks.2.1", Adapted(nn.Conv2d(12, 12, 1)), "it does not compute as nn.Conv2d does"),
    "standardised weights": ("blocks.2.1", Standardised(12, 12, 1), "it does not compute as nn.Conv2d does"),
    "an overlapping stem": ("stem.0", nn.Conv2d(3, 12, 2, stride=2, padding=1), "padding=(1, 1) instead of (0, 0)"),
    "no bias": ("blocks.0.1", nn.Conv2d(12, 12, 1, bias=False), "it has no bias"),
    "another norm": ("blocks.0.3", nn.GroupNorm(3, 12), "it does not compute as nn.BatchNorm2d does"),
    "statistics of the batch": ("stem.2", nn.BatchNorm2d(12, track_running_stats=False), "no running statistics"),
    "another pool": ("global_pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "SelectAdaptivePool2d"),
    "no block": ("blocks.1", nn.Identity(), "it is not a block of a ConvMixer"),
}


@pytest.mark.parametrize("backend", ["eager", "auto", "native", "triton"])
@pytest.mark.parametrize("case", REPLACED)
def test_a_replaced_layer_is_not_taken_for_the_original(case, backend, monkeypatch):
    """The copy would have the weights of the layer, and would compute something else with them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name, layer, text = REPLACED[case]
    model = make(torch.float32)
    model.set_submodule(name, layer)
    expected = rf"cannot fold this model: {re.escape(name)} is a .*{re.escape(text)}.*Use the model as it is"
    with pytest.raises(ArgumentError, match=expected):
        optimize(model, backend=backend)


@pytest.mark.parametrize("where", ["", "stem", "blocks.1.0.fn.1", "block_drop", "head_drop", "global_pool"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_not_dropped(where, kind):
    """They may change what a layer computes, and the copy would not call them."""
    model = make()
    handle = getattr(model.get_submodule(where), kind)(lambda *values: None)
    with pytest.raises(
        ArgumentError, match=rf"cannot fold this model: {where or 'the model'} has forward hooks.*Remove"
    ):
        optimize(model)
    handle.remove()
    check(model, torch.randn(2, 3, 9, 12, dtype=torch.float64))


def test_hooks_of_the_head_are_kept():
    model = make()
    model.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    check(model, torch.randn(2, 3, 9, 12, dtype=torch.float64))


def test_hooks_that_compute_weights():
    """As PyTorch's pruning has them; the weight is that of the next call, not of the last one."""
    model = make()
    prune.l1_unstructured(model.blocks[0][0].fn[0], "weight", 0.5)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.blocks[1][1])
    with torch.no_grad():
        model.blocks[0][0].fn[0].weight_orig.mul_(2)
        model.blocks[1][1].weight_g.mul_(2)
    prune.l1_unstructured(model.head, "weight", 0.5)  # the head is copied as it is
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    check(model, x)
    assert torch.equal(copy.deepcopy(optimize(model))(x), optimize(model)(x))


def test_weights_that_reading_changes():
    """spectral_norm takes a step of its power iteration whenever a weight is read in training mode."""
    model = make().train()
    for layer in (model.stem[0], model.blocks[1][1]):
        nn.utils.parametrizations.spectral_norm(layer)
    before = copy.deepcopy(model)
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    assert error(optimize(model)(x), before.eval()(x).detach()) < 1e-10
    assert model.training
    for (name, value), expected in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("where", ["", "stem", "blocks.1", "blocks.1.0", "blocks.1.0.fn.1", "head_drop"])
def test_a_forward_of_its_own_is_not_dropped(where):
    model = make()
    module = model.get_submodule(where)
    module.forward = lambda x: 2 * type(module).forward(module, x)
    with pytest.raises(
        ArgumentError, match=rf"cannot fold this model: {where or 'the model'} is a .* has a forward of its"
    ):
        optimize(model)


def test_a_class_of_its_own():
    class Twice(ConvMixer):
        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return 2 * super().forward_head(x, pre_logits)

    with pytest.raises(ArgumentError, match=r"cannot fold this model: the model is a .*Twice, and its class computes"):
        optimize(Twice(12, 3, kernel_size=5, patch_size=2))


class Noise(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1


@pytest.mark.parametrize("where", ["block_drop", "head_drop", "blocks.1.0.drop_path"])
def test_what_takes_the_place_of_dropout(where):
    model = make()
    model.set_submodule(where, Noise())
    with pytest.raises(
        ArgumentError, match=rf"cannot fold this model: {re.escape(where)} is a .* more than drop values"
    ):
        optimize(model)
    model.set_submodule(where, nn.Dropout(0.5).eval())
    check(model, torch.randn(2, 3, 9, 12, dtype=torch.float64))


def test_layers_of_others_that_compute_the_same():
    model = make()
    depthwise = model.blocks[1][0].fn[0]
    model.blocks[1][0].fn[0] = nn.Conv2d(12, 12, 5, padding="same", groups=12).double()
    model.blocks[1][0].fn[0].load_state_dict(depthwise.state_dict())
    model.blocks[0][3] = nn.BatchNorm2d(12, affine=False).double().eval()
    model.blocks[2][3] = FrozenBatchNorm2d(12).double()
    nn.utils.parametrizations.weight_norm(model.blocks[2][1])
    check(model, torch.randn(2, 3, 9, 12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "brain16"])
def test_types_that_cannot_be_computed(dtype):
    with pytest.raises(ArgumentError, match=re.escape(f"dtype={dtype!r}: give a floating point type")):
        optimize(make(), dtype=dtype)


def test_model_of_a_type_that_cannot_be_computed():
    with pytest.warns(UserWarning, match="Complex modules are a new feature"):
        model = make().to(torch.complex64)
    with pytest.raises(ArgumentError, match=r"dtype=torch\.complex64: give a floating point type"):
        optimize(model)


def test_inputs_that_do_not_fit():
    folded = optimize(make())
    for call in (folded, folded.forward_features, folded.forward_intermediates):
        with pytest.raises(ImageError, match="has 4 channels, this model takes in_chans=3"):
            call(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match="unknown output_fmt 'NLC'; valid: NCHW, NHWC"):
        folded.forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NLC")
    with pytest.raises(ArgumentError, match=r"indices=\[3\]: give different block indices from -3 to 2"):
        folded.forward_intermediates(torch.zeros(1, 3, 8, 8), [3])
