"""The depthwise convolution against PyTorch's own, in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convmixer import ConvMixer, accelerate
from convmixer.errors import ArgumentError
from convmixer.model import DepthwiseConv2d
from convmixer.ops import depthwise_conv2d, prefers_channels_last, set_depthwise_kernels
from convmixer.ops.triton import tables


@pytest.mark.parametrize("kernel_size", range(1, 12))
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (9, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(kernel_size, size, bias):
    leaves = [torch.randn(2, 3, *size), torch.randn(3, 1, kernel_size, kernel_size)] + [torch.randn(3)] * bias
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    ours = depthwise_conv2d(*leaves)
    pad = [(kernel_size - 1) // 2, kernel_size // 2] * 2
    theirs = F.conv2d(F.pad(leaves[0], pad), *leaves[1:], groups=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, leaves, grad)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the weight gradient is summed in float32


def test_frozen_inputs_get_no_gradient():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(depthwise_conv2d(x, weight).sum(), weight)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, padding="same", groups=2).sum(), weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_second_derivatives(kernel_size):
    leaves = [torch.randn(1, 2, 4, 5), torch.randn(2, 1, kernel_size, kernel_size), torch.randn(2)]
    assert torch.autograd.gradgradcheck(depthwise_conv2d, [leaf.double().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16 autocast"])
def test_compiled_training_uses_it(monkeypatch, dtype):
    calls = []
    from convmixer import ops

    monkeypatch.setattr(ops, "depthwise_conv2d", lambda *a: calls.append(len(a)) or depthwise_conv2d(*a))
    torch._dynamo.reset()
    model, twin = ConvMixer(8, 2, 3, 2, num_classes=3), ConvMixer(8, 2, 3, 2, num_classes=3)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        a, b = compiled(x).float(), twin(x).float()
    a.square().sum().backward()
    b.square().sum().backward()
    tolerance = 1e-4 if dtype is None else 0.1
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= tolerance * q.grad.norm() + 1e-3, name
    assert len(calls) == 2  # one per block, while compiling


@pytest.fixture
def on_kernels(monkeypatch):
    """Layers on the CPU compute as they do on a CUDA device, by the functions of `reference`; counts of their calls."""
    from convmixer.ops import depthwise, dispatch, reference

    calls = {"forward": 0, "backward": 0}

    class Kernels:
        depthwise_weight_grad = staticmethod(reference.depthwise_weight_grad)

        @staticmethod
        def depthwise_infer(x, weight, bias, *rest):
            assert rest == ("identity", None, None, None)
            calls["forward"] += 1
            return reference.correlate(x, weight, bias)

        @staticmethod
        def depthwise_input_grad(grad, weight):
            calls["backward"] += 1
            return reference.depthwise_input_grad(grad, weight)

    monkeypatch.setattr(dispatch, "kernels", lambda x: Kernels)
    monkeypatch.setattr(depthwise, "_device_kind", lambda x: "cuda")
    monkeypatch.setattr(depthwise, "_fits", lambda *_: True)
    return calls


@pytest.mark.parametrize("kernel_size", [4, 5])
def test_plain_layers_run_on_kernels(on_kernels, kernel_size):
    model, twin = (ConvMixer(8, 2, kernel_size, 2, num_classes=3) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    loss = model(x).square().sum()
    loss.backward()
    assert on_kernels == {"forward": 2, "backward": 2}
    set_depthwise_kernels(False)
    try:
        other = twin(x).square().sum()
        other.backward()
    finally:
        set_depthwise_kernels(True)
    assert on_kernels == {"forward": 2, "backward": 2}
    torch.testing.assert_close(loss, other)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_exports_hold_no_operators_of_this_package(on_kernels):
    model = ConvMixer(8, 2, 3, 2, num_classes=3).eval()
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (x,), strict=False)  # as newer versions do by themselves
    torch.jit.trace(model, x, check_trace=False)
    torch.fx.symbolic_trace(model)(x)
    assert on_kernels["forward"] == 0
    assert not any("convmixer" in str(node.target) for node in program.graph.nodes)
    model(x)
    assert on_kernels["forward"] == 2


def test_models_of_others_are_accelerated(on_kernels):
    plain = TimmConvMixer(dim=8, depth=2, kernel_size=5, patch_size=2, num_classes=3)
    model = copy.deepcopy(plain)
    assert accelerate(model) is model
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x), plain(x))
    assert on_kernels["forward"] == 2
    accelerate(model)  # once more changes nothing
    torch.testing.assert_close(copy.deepcopy(model).eval()(x), copy.deepcopy(plain).eval()(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=4, padding="same"),
        nn.Conv2d(4, 4, 4, groups=4, padding="same"),
        nn.Conv2d(4, 4, 5, groups=4, padding=2, bias=False),
    ],
)
def test_accelerated_layers_compute_the_same(layer):
    x = torch.randn(2, 4, 7, 6)
    expected = layer(x)
    assert type(accelerate(layer)) is DepthwiseConv2d
    torch.testing.assert_close(layer(x), expected)


def test_a_layer_with_a_forward_of_its_own_stays():
    """As hooks of Hugging Face accelerate give it one, which goes on computing by the old padding."""
    layer = nn.Conv2d(4, 4, 4, groups=4, padding="same")
    layer.forward = layer.forward
    with pytest.raises(ArgumentError, match="no depthwise convolution"):
        accelerate(layer)


def test_fake_tensors_of_a_device_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("layers of PyTorch 2.7 themselves ask for a device; versions up to 2.10 were not tried")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = ConvMixer(8, 1, 5, 2, device="cuda")
        assert model(torch.empty(2, 3, 8, 8, device="cuda")).shape == (2, 1000)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2),
        nn.Conv2d(4, 4, (3, 1), groups=4, padding="same"),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2),
    ],
)
def test_other_layers_stay(layer):
    with pytest.raises(ArgumentError, match="Conv2d has no depthwise convolution that keeps the resolution"):
        accelerate(layer)
    assert type(layer) is nn.Conv2d


def test_layouts(monkeypatch):
    cpu, gpu, kind = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    assert [prefers_channels_last(cpu, kind, size) for size in (5, 7, 9)] == [True] * 3
    assert not prefers_channels_last(torch.device("mps"), kind, 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("convmixer.ops.depthwise._fits", lambda device, dtype, size: size < 16)
    assert [prefers_channels_last(gpu, kind, size) for size in (5, 7, 9, 17)] == [True, True, True, False]
    monkeypatch.setattr("convmixer.ops.depthwise._enabled", False)  # cuDNN's
    assert [prefers_channels_last(gpu, kind, size) for size in (5, 7, 9, 17)] == [True, True, False, False]


def _eager(layer, x):
    try:
        return layer(x).dtype
    except RuntimeError:
        return RuntimeError


@pytest.mark.parametrize(
    ("layer_dtype", "shape", "dtype"),
    [
        (torch.float64, (2, 4, 8, 8), torch.float64),  # autocast leaves it alone
        (torch.bfloat16, (2, 4, 8, 8), torch.float32),
        (torch.float32, (4, 8, 8), torch.float32),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_only_pytorch_takes_is_its_own(layer_dtype, shape, dtype, autocast):
    torch._dynamo.reset()
    layer, x = DepthwiseConv2d(4, 4, 3, groups=4, dtype=layer_dtype), torch.rand(shape, dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = _eager(layer, x)
        if expected is RuntimeError:
            with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException)):
                compiled(x)
        else:
            assert compiled(x).dtype == expected


def test_transforms_of_torch_func_are_pytorchs(on_kernels):
    layer, x = DepthwiseConv2d(4, 4, 3, groups=4), torch.rand(5, 2, 4, 8, 8)
    parameters = dict(layer.named_parameters())

    def total(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).sum()

    gradients = torch.func.vmap(torch.func.grad(total), (None, 0))(parameters, x)
    assert gradients["weight"].shape == (5, *layer.weight.shape)
    assert torch.func.jvp(layer, (x[0],), (x[0],))[1].shape == x[0].shape
    assert on_kernels["forward"] == 0
    layer(x[0])
    assert on_kernels["forward"] == 1


def test_no_home_means_nothing_tuned(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from convmixer.ops.triton import tune

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tables.Path, "home", nowhere)
    tables.forget_choices()
    assert tables.tuned("some GPU") == []
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file"):
        if folder:
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        with pytest.raises(ArgumentError, match=r"rows cannot be kept .*: set XDG_CACHE_HOME"):
            tune._check_folder("some GPU")
