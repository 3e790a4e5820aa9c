"""The tensor functions of fused blocks in plain PyTorch: what every kernel must compute, and what runs on CPUs.

Feature maps are (B, C, H, W) in any memory format, which results keep; vectors are (C,). Vectors, sums and everything
between reading and writing a feature map are float32, or float64 for float64 feature maps. `act` is "gelu" (exact),
"relu" or "identity".
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 2**16  # values whose float32 temporaries stay in a cache
_TILE = 16  # columns of a row-Toeplitz matrix multiplication: wider ones multiply more zeros


def to_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type; never `x.to` of the type that it has: returned by an autograd.Function, that has no gradient under
    `torch.compile` of some versions (2.11).
    """
    return x if x.dtype == dtype else x.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else to_type(x, torch.float32)


def _parts(*maps: Tensor) -> list[tuple[Tensor, ...]]:
    """Yield feature maps in groups of images; a compiler, and a GPU, take them whole."""
    first = maps[0]
    if torch.compiler.is_compiling() or first.device.type != "cpu" or first.numel() <= _PART:
        return [maps]
    images = max(1, _PART * len(first) // first.numel())
    return list(zip(*(each.split(images) for each in maps), strict=True))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _over_channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def activate(u: Tensor, act: str) -> Tensor:
    """Compute act(u), of u's type."""
    if act == "gelu":
        return F.gelu(u)
    return u.relu() if act == "relu" else u


def _activation_grad(grad: Tensor, u: Tensor, act: str) -> Tensor:
    """Compute grad * act'(u)."""
    if act == "gelu":
        return cast("Tensor", torch.ops.aten.gelu_backward(grad, u))
    return torch.where(u > 0, grad, 0.0) if act == "relu" else grad


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None, before: int, after: int) -> Tensor:
    if before == after:
        return F.conv2d(x, weight, bias, padding=before, groups=x.shape[1])
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, bias, groups=x.shape[1])


def _borders(kernel_size: int) -> tuple[int, int]:
    """Return the rows of padding before and after; even kernels need one more at the end."""
    return (kernel_size - 1) // 2, kernel_size // 2


def correlate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.conv2d(x, weight, bias, padding="same", groups=C)` with (C, 1, k, k) kernels."""
    return _correlate(x, weight, bias, *_borders(weight.shape[-1]))


# ---- activation and normalisation -----------------------------------------------------------------------------------


def normalize_act(u: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """Compute `scale * act(u) + shift`, of u's type."""
    return _join([to_type(_normalized(u, scale, shift, act), u.dtype) for (u,) in _parts(u)])


def _normalized(u: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    return torch.addcmul(_over_channels(shift), activate(_wide(u), act), _over_channels(scale))


def _add_normalized(x: Tensor, c: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """Compute `x + scale * act(c) + shift`, of x's type."""
    return _join([to_type(_wide(x) + _normalized(c, scale, shift, act), x.dtype) for x, c in _parts(x, c)])


def sum_normalized(
    c: Tensor, scale: Tensor, shift: Tensor, act: str, u: Tensor, scale_u: Tensor, shift_u: Tensor, act_u: str
) -> Tensor:
    """Compute `scale * act(c) + shift + scale_u * act_u(u) + shift_u`, of c's type."""
    before = scale_u, shift_u, act_u
    return _join(
        [to_type(_normalized(c, scale, shift, act) + _normalized(u, *before), c.dtype) for c, u in _parts(c, u)]
    )


def normalize_act_grad(grad: Tensor, u: Tensor, scale: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize_act` for u, scale and shift."""
    grads, scales, shifts = [], [], []
    for part, u_part in _parts(grad, u):
        wide, values = _wide(part), _wide(u_part)
        grads.append(to_type(_activation_grad(wide * _over_channels(scale), values, act), u.dtype))
        scales.append((wide * activate(values, act)).sum((0, 2, 3)))
        shifts.append(wide.sum((0, 2, 3)))
    return _join(grads), _total(scales), _total(shifts)


def _total(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.stack(vectors).sum(0)


def stats(u: Tensor, act: str, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sum `act(u) - center`, and its square, over B, H and W."""
    sums, squares = [], []
    for (part,) in _parts(u):
        offset = activate(_wide(part), act) - _over_channels(center)
        sums.append(offset.sum((0, 2, 3)))
        squares.append(offset.square().sum((0, 2, 3)))
    return _total(sums), _total(squares)


def stats_grad(
    grad_u: Tensor, u: Tensor, act: str, center: Tensor, grad_s: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `grad_u` plus the gradient of `stats` for u; and the sum of that over B, H and W."""
    results, sums = [], []
    for grad, part in _parts(grad_u, u):
        values = _wide(part)
        offset = activate(values, act) - _over_channels(center)
        inner = _over_channels(grad_s) + 2 * offset * _over_channels(grad_q)
        results.append(to_type(_wide(grad) + _activation_grad(inner, values, act), u.dtype))
        sums.append(_wide(results[-1]).sum((0, 2, 3)))
    return _join(results), _total(sums)


# ---- depthwise ------------------------------------------------------------------------------------------------------


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, act: str, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute c, the convolution of x with (C, 1, k, k) kernels at equal resolution plus bias; and `stats` of c."""
    c = correlate(x, weight, bias.to(x.dtype))
    return c, *stats(c, act, center)


def depthwise_infer(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, scale: Tensor, shift: Tensor, residual: Tensor
) -> Tensor:
    """Compute `scale * act(c) + shift + residual`, where c is `depthwise` of x."""
    c = correlate(x, weight, bias.to(x.dtype))
    return _add_normalized(residual, c, scale, shift, act)


def depthwise_input_grad(grad: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return the gradient of `depthwise` for x, given that for c; plus `residual`."""
    before, after = _borders(weight.shape[-1])
    # The transpose of a correlation is one with the flipped kernel, padded the other way round.
    result = _correlate(grad, weight.flip(-2, -1), None, after, before)
    return result if residual is None else residual + result


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of `depthwise` for weight and bias, given x and the gradient for c.

    PyTorch's own is slow on CPUs. Compiled, one multiplication and sum per kernel tap becomes a single pass over both
    tensors; in eager mode, multiplications of matrices that hold a row of an image in each line are faster.
    """
    taps = _taps if torch.compiler.is_compiling() else _toeplitz
    weight = taps(x, grad, kernel_size).view(-1, 1, kernel_size, kernel_size)
    return weight, _wide(grad).sum((0, 2, 3))


def _taps(x: Tensor, grad: Tensor, size: int) -> Tensor:
    height, width = x.shape[-2:]
    # Not permuted to (B, H, W, C): a compiler would then store x in a layout that is slow to read.
    padded, last = _wide(torch.ops.convmixer.pad(x, *_borders(size))), _wide(grad)
    taps = [(padded[..., i : i + height, j : j + width] * last).sum((2, 3)) for i in range(size) for j in range(size)]
    # Summed per image first: the partial sums of one image stay in the cache.
    return torch.stack(taps, 2).sum(0)


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (before, after, before, after))


# An operator that compilers cannot look into: what x is made of is computed once, and not for each tap.
_LIBRARY = torch.library.Library("convmixer", "FRAGMENT")
_LIBRARY.define("pad(Tensor x, int before, int after) -> Tensor")
for _key in ("CPU", "Meta"):
    _LIBRARY.impl("pad", _pad, _key)


def _toeplitz(x: Tensor, grad: Tensor, size: int) -> Tensor:
    before, after = _borders(size)
    batch, channels, height, width = x.shape
    tile = min(width, _TILE)
    tiles = math.ceil(width / tile)
    more = tiles * tile - width
    # Lines of (channels, rows x batch x tiles): `size - 1` columns more of x than of grad.
    lines = F.pad(x, (before, after + more, before, after)).permute(1, 2, 0, 3).unfold(3, tile + size - 1, tile)
    lines = lines.reshape(channels, -1, tile + size - 1)
    columns = F.pad(grad, (0, more)).permute(1, 2, 0, 3).reshape(channels, -1, tile)
    each = batch * tiles
    rows = []
    for i in range(size):
        product = torch.bmm(lines[:, i * each : (i + height) * each].mT, columns)  # (channels, tile + size - 1, tile)
        # Column w of grad meets column w + j of x at tap j: each tap is the sum of a diagonal.
        rows.append(torch.stack([_wide(product.diagonal(-j, 1, 2)).sum(1) for j in range(size)], 1))
    return torch.cat(rows, 1)


# ---- pointwise ------------------------------------------------------------------------------------------------------


def pointwise(
    c: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    center: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, (O, C) weights times `scale1 * act(c) + shift1 + x`, plus bias; and `stats` of u."""
    u = F.conv2d(_add_normalized(x, c, scale1, shift1, act), weight[..., None, None], bias.to(c.dtype))
    return u, *stats(u, act, center)


def pointwise_infer(z: Tensor, weight: Tensor, bias: Tensor, act: str, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `scale * act(u) + shift`, where u is (O, C) weights times z, plus bias."""
    u = F.conv2d(z, weight[..., None, None], bias.to(z.dtype))
    return normalize_act(u, scale, shift, act)


def pointwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a 1x1 convolution for its input, given (O, C) weights and the gradient for its output."""
    return F.conv2d(grad, weight.t()[..., None, None])


def pointwise_weight_grad(grad: Tensor, z: Tensor) -> Tensor:
    """Return the gradient (O, C) of a 1x1 convolution of z for its weight, given the gradient for its output."""
    like, one, none = z.new_empty(grad.shape[1], z.shape[1], 1, 1), [1, 1], [0, 0]
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad, z, like, None, one, none, one, False, none, 1, [False, True, False]
    )
    return gradients[1].flatten(1)


# ---- vectors --------------------------------------------------------------------------------------------------------


def expected_mean(weight: Tensor, bias: Tensor, features: Tensor, act: str) -> Tensor:
    """Compute `act(convolution(x))` for x that is everywhere its mean: about the mean of the activation, (O,).

    Args:
        weight: (O, I, 1, 1), or (O, 1, k, k) of a depthwise convolution.
        bias: (O,).
        features: The mean of each channel of x, (I,), or (O,) for a depthwise convolution; the result has its type.
        act: The activation after the convolution.
    """
    wide = features.dtype
    products = weight.to(wide).flatten(1) * (features[:, None] if weight.shape[1] == 1 else features)
    return activate(bias.to(wide) + products.sum(1), act)


def affine(
    s: Tensor, q: Tensor, center: Tensor, weight: Tensor | None, bias: Tensor | None, count: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return BatchNorm as scale and shift, and mean and variance of the values, (C,) each.

    `scale = weight / sqrt(var + eps)` and `shift = bias - mean * scale`, where `mean = center + s / count` and
    `var = max(q / count - (s / count)², 0)`.

    Args:
        s: The sum of `value - center` over the values of each channel, (C,).
        q: The sum of its square, (C,).
        center: About the mean, (C,).
        weight: Of the BatchNorm, (C,); None: 1.
        bias: Of the BatchNorm, (C,); None: 0.
        count: The number of values of each channel.
        eps: Of the BatchNorm.
    """
    offset = s / count
    var = (q / count - offset.square()).clamp(min=0)
    mean = center + offset
    return *scale_and_shift(mean, var, weight, bias, eps), mean, var


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return BatchNorm by a mean and a variance as scale and shift, (C,) each; `affine` names the arguments."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def affine_grad(
    grad_scale: Tensor,
    grad_shift: Tensor,
    s: Tensor,
    q: Tensor,
    center: Tensor,
    weight: Tensor | None,
    count: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `affine` for s, q and weight, (C,) each, given those for scale and shift.

    The gradient for bias is `grad_shift`. The mean and the variance that `affine` returns pass on none.
    """
    offset = s / count
    var = q / count - offset.square()
    root = torch.rsqrt(var.clamp(min=0) + eps)
    scale = root if weight is None else root * weight
    grad_scale = grad_scale - (center + offset) * grad_shift
    grad_var = torch.where(var < 0, 0.0, -0.5 * root.square() * scale * grad_scale)
    return (-grad_shift * scale - 2 * offset * grad_var) / count, grad_var / count, grad_scale * root
