"""The depthwise convolution of layers, forward and backward by the fastest kernels of its device.

On CUDA devices these are the Triton kernels of `triton/launch.py`, in eager mode and compiled. On CPUs only the weight
gradient differs from PyTorch's: that of `reference.py`, which only a compiler makes faster. The layer,
`convmixer.model.DepthwiseConv2d`, asks `runs_on_kernels`, and computes by PyTorch where the answer is no.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from convmixer.errors import ConvMixerError
from convmixer.ops import dispatch, reference

_LOGGER = logging.getLogger(__name__)
_enabled = True


def set_depthwise_kernels(enabled: bool) -> None:
    """Let depthwise layers on CUDA devices run on this package's kernels, as they do by default, or on PyTorch's.

    The choice holds for the whole process. A model that is compiled already is compiled anew.
    """
    global _enabled
    _enabled = enabled


@functools.lru_cache(maxsize=64)
def _check(device: torch.device, dtype: torch.dtype, kernel_size: int) -> bool:
    try:
        dispatch.check(device, dtype, [kernel_size])
    except ConvMixerError as error:
        _LOGGER.info("depthwise layers of kernel size %d run on PyTorch's kernels: %s", kernel_size, error)
        return False
    _LOGGER.info("depthwise layers of kernel size %d in %s run on convmixer's Triton kernels", kernel_size, dtype)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fits(device: torch.device, dtype: torch.dtype, kernel_size: int) -> bool:
    """Return whether the kernels take this device, type and size; the log says so once for each."""
    try:
        return _check(device, dtype, kernel_size)  # torch.compile warns of a cached function that it meets itself
    except (RuntimeError, AssertionError):  # a device that is not here, as fake tensors can be on
        return False


def prefers_channels_last(device: torch.device, dtype: torch.dtype, kernel_size: int) -> bool:
    """Return whether depthwise layers are known to run faster in channels_last.

    They do on CPUs, and on CUDA devices by this package's kernels. By cuDNN 5x5 and 7x7 kernels do; 9x9 ones took five
    times as long as in NCHW (bfloat16, H200).
    """
    if device.type == "cuda":
        ours = _enabled and torch.cuda.is_available() and _fits(device, dtype, kernel_size)
        return ours or kernel_size in (5, 7)
    return device.type == "cpu"


def _device_kind(x: Tensor) -> str:
    return x.device.type


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution of x computes: autocast's if that is on."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def is_transformed() -> bool:
    """Return whether `torch.func` or forward-mode differentiation is at work, for which the kernels have no rules."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is at work, by `torch.func.jvp` or dual numbers."""
    return forward_ad._current_level >= 0


def runs_on_kernels(x: Tensor, weight: Tensor, training: bool) -> bool:
    """Return whether `depthwise_conv2d` is the faster way for a layer.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k).
        training: The mode of the layer.
    """
    kind = _device_kind(x)
    alike = weight.device == x.device and (weight.dtype == x.dtype or torch.is_autocast_enabled(kind))
    if not alike or x.dim() != 4 or is_transformed():
        return False
    if kind == "cuda":
        return _enabled and _fits(x.device, compute_dtype(x), weight.shape[-1])
    # On a CPU it is the weight gradient that is faster, and only compiled.
    return (
        kind == "cpu"
        and training
        and torch.compiler.is_compiling()
        and weight.requires_grad
        and torch.is_grad_enabled()
    )


class _DepthwiseConv2d(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _device_kind(x) == "cuda":
            result: Tensor = dispatch.kernels(x).depthwise_infer(x, weight, bias, "identity", None, None, None)
            return result
        return reference.correlate(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_grads(ctx.needs_input_grad, x, weight, bias, grad)
        kernels = dispatch.kernels(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.depthwise_input_grad(grad, weight)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = kernels.depthwise_weight_grad(x, grad, weight.shape[-1])
            grad_weight = reference.to_type(grad_weight, weight.dtype)
            grad_bias = None if bias is None else reference.to_type(grad_bias, bias.dtype)
        return grad_x, grad_weight, grad_bias


def _differentiable_grads(
    wanted: tuple[bool, ...], x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients by PyTorch, which can differentiate them once more."""
    inputs = x, weight, bias
    leaves = [tensor for tensor, needed in zip(inputs, wanted, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(reference.correlate(*inputs), leaves, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.conv2d(x, weight, bias, padding="same", groups=C)`, with gradients by fast kernels.

    Under autocast the inputs are converted as those of a convolution are. Second derivatives are computed by PyTorch.

    Args:
        x: Input, (B, C, H, W); channels_last is fastest, and on CUDA devices the layout of the result.
        weight: Kernel, (C, 1, k, k), of x's dtype.
        bias: (C,) or None.

    Returns:
        (B, C, H, W).
    """
    dtype = compute_dtype(x)
    result: Tensor = _DepthwiseConv2d.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return result
