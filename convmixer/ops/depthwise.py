"""Depthwise convolution with a weight gradient that a compiler can fuse.

PyTorch's own weight gradient of a depthwise convolution takes up to half of a training step on a CPU. Written as one
product and sum per kernel tap it is, in eager mode, slower still; compiled by `torch.compile`, all taps become one
pass over the two tensors. So `convmixer.model` uses this function only while it is being compiled for a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, padding="same", groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        size = weight.shape[-1]
        before, after = (size - 1) // 2, size // 2
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # The transpose of a correlation is one with the flipped kernel; an even kernel pads the other side more.
            padded_grad = grad if before == after else F.pad(grad, (after, before, after, before))
            padding = before if before == after else 0
            grad_x = F.conv2d(padded_grad, weight.flip(-2, -1), padding=padding, groups=x.shape[1])
        if ctx.needs_input_grad[1]:
            height, width = x.shape[-2:]
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, before, after, before, after)).float()  # (B, H+k-1, W+k-1, C)
            last = grad.permute(0, 2, 3, 1).float()  # (B, H, W, C)
            taps = [
                (padded[:, i : i + height, j : j + width] * last).sum((1, 2)) for i in range(size) for j in range(size)
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
