"""The depthwise convolution against PyTorch's own, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from convmixer import ConvMixer
from convmixer.ops import depthwise_conv2d


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


def test_second_derivatives_are_refused():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(depthwise_conv2d(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
