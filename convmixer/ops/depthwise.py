"""Depthwise convolution with the weight gradient of `reference.py`, which is faster on CPUs than PyTorch's.

`convmixer.model` uses this function in blocks that are not fused, only while it is being compiled for a CPU;
`benchmarks/train_step.py` measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convmixer.ops import reference


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return reference.correlate(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = reference.depthwise_input_grad(grad, weight)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = reference.depthwise_weight_grad(x, grad, weight.shape[-1])
            grad_weight = grad_weight.to(weight.dtype)
            grad_bias = grad_bias.to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding="same", groups=C)` with a weight gradient made for `torch.compile`.

    Args:
        x: Input, (B, C, H, W); channels_last is fastest.
        weight: Kernel, (C, 1, k, k), of x's dtype.
        bias: (C,) or None.

    Returns:
        (B, C, H, W). First derivatives only.
    """
    result: Tensor = _DepthwiseConv2d.apply(x, weight, bias)
    return result
