"""Depthwise convolution with a weight gradient that a compiler can fuse.

PyTorch's own weight gradient of a depthwise convolution is slow on CPUs. Written as one product and sum per kernel tap
it is slower still in eager mode; compiled by `torch.compile`, all taps become one pass over the two tensors. So
`convmixer.model` uses this function only while it is being compiled for a CPU; `benchmarks/train_step.py` measures it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None, before: int, after: int) -> Tensor:
    if before == after:
        return F.conv2d(x, weight, bias, padding=before, groups=x.shape[1])
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, bias, groups=x.shape[1])


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _correlate(x, weight, bias, (weight.shape[-1] - 1) // 2, weight.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        size = weight.shape[-1]
        before, after = (size - 1) // 2, size // 2
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The transpose of a correlation is one with the flipped kernel, padded the other way round.
            grad_x = _correlate(grad, weight.flip(-2, -1), None, after, before)
        if ctx.needs_input_grad[1]:
            height, width = x.shape[-2:]
            # Not permuted to (B, H, W, C): a compiler would then store x in a layout that is slow to read.
            padded, last = F.pad(x, (before, after, before, after)).float(), grad.float()
            taps = [
                (padded[..., i : i + height, j : j + width] * last).sum((2, 3))
                for i in range(size)
                for j in range(size)
            ]
            # Summed per image first: the partial sums of one image stay in the cache.
            grad_weight = torch.stack(taps, 2).sum(0).view(weight.shape).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
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
