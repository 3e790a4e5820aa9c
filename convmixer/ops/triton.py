"""Triton kernels of a ConvMixer block for CUDA devices; `convmixer.ops.reference` has the same functions for any tensor.

Activations are (B, C, H, W) and lie in memory as (B, H, W, C), channels_last; other layouts are accepted and copied into
it first. They are bfloat16, float16 or float32, all sums are float32. No kernel uses atomics: each program writes its
own partial sums and a second pass adds them, so results do not change from run to run on one GPU.

The depthwise convolution exists in two forms, and a row of `DEPTHWISE` says which one runs:

direct   On the CUDA cores. A thread holds `columns` neighbouring outputs of two channels in registers. An input value
         is loaded and converted once per kernel row and used for up to k outputs. Channels lie side by side in memory,
         so each load of a warp is one line of 128 bytes.
banded   On the tensor cores. For one channel, a row of outputs is `Y[h] = sum_i X[h+i] T_i`, where T_i is the banded
         matrix (inputs x outputs) of kernel row i. A program holds T_0 ... T_{k-1} and streams rows past them, of 16
         images or strips of images at a time, which are the rows of the product: every input row is loaded once and
         multiplied by all T_i, into k rolling rows of outputs. 16 inputs make 8 outputs where k is at most 9, so
         16/k times as many products are computed as needed; 32 make 16 above. What the layout costs: the inputs of one
         channel lie C elements apart, so blocks of 16 channels are loaded together (32 bytes in a line) and go through
         shared memory to reach the tensor cores channel by channel; and neighbouring tiles share inputs, which are
         read twice.

No row of the tables was measured: they come from what the compiler says (`benchmarks/kernels_static.py`). `tune` measures
candidates on the GPU at hand.

GELU is `max(u, 0) - |u| Q(|u|)` with the normal distribution's tail Q by Abramowitz & Stegun 26.2.17, whose error of
7.5e-8 is below float32's resolution of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convmixer.errors import ArgumentError, DependencyError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise DependencyError("the fused kernels need triton, which is missing: pip install triton") from error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_SIZES = range(3, 12)
ACTIVATIONS = ("gelu", "relu", "identity")


# ---- tables ---------------------------------------------------------------------------------------------------------


class Direct(NamedTuple):
    """A program's tile: `down` x `across` groups of `columns` outputs in a row, of `channels` channels."""

    columns: int
    down: int
    across: int
    channels: int
    warps: int


class Banded(NamedTuple):
    """A program's tile: 16 images or strips of `rows` rows, of `channels` channels; 8 columns, with k > 9 16."""

    rows: int
    channels: int
    warps: int


class Gradient(NamedTuple):
    """A program's share of a weight gradient: `kernel_rows` of the kernel, sums over tiles of `groups` x `columns`."""

    kernel_rows: int
    columns: int
    groups: int
    channels: int
    warps: int


class Product(NamedTuple):
    """A program's tile of the 1x1 convolution: `rows` positions x `outputs`, in steps of `inputs` channels."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


# By compute capability (the nearest below counts), kernel size and bytes of an element. Unmeasured.
DEPTHWISE: dict[tuple[int, int, int], Direct | Banded] = {
    **{(capability, size, 2): Banded(32, 16, 8) for capability in (80, 90) for size in KERNEL_SIZES},
    **{(capability, size, 4): Direct(16, 4, 1, 32, 4) for capability in (80, 90) for size in KERNEL_SIZES},
}
WEIGHT_GRADIENT: dict[tuple[int, int, int], Gradient] = {
    **{(capability, size, 2): Gradient(2, 8, 4, 64, 4) for capability in (80, 90) for size in KERNEL_SIZES},
    **{(capability, size, 4): Gradient(2, 8, 4, 32, 4) for capability in (80, 90) for size in KERNEL_SIZES},
}
# By compute capability, whether z is formed on the way (1) or given (0), and bytes of an element. Unmeasured.
POINTWISE: dict[tuple[int, int, int], Product] = {
    (80, 0, 2): Product(128, 128, 32, 8, 3),
    (80, 1, 2): Product(128, 128, 32, 8, 3),
    (80, 0, 4): Product(64, 64, 32, 4, 2),
    (80, 1, 4): Product(64, 64, 32, 4, 2),
    (90, 0, 2): Product(128, 256, 64, 8, 3),
    (90, 1, 2): Product(64, 256, 64, 4, 2),
    (90, 0, 4): Product(64, 128, 32, 8, 2),
    (90, 1, 4): Product(64, 128, 32, 8, 2),
}
# What `tune` tries beside the row of the table.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "depthwise": (
        *(Direct(columns, down, 1, 64, 4) for columns in (8, 16) for down in (4, 8)),
        *(Banded(rows, 16, warps) for rows in (16, 32) for warps in (8, 16)),
        Banded(32, 32, 16),
    ),
    "weight_gradient": (
        *(Gradient(rows, columns, 4, 64, 4) for rows in (1, 2, 3) for columns in (8, 16)),
        Gradient(2, 8, 8, 64, 8),
    ),
    "pointwise": (
        *(Product(128, outputs, 64, 8, stages) for outputs in (128, 256) for stages in (2, 3)),
        Product(64, 256, 64, 4, 3),
        Product(128, 128, 32, 4, 3),
    ),
}
ROWS, CHANNELS = 32, 128  # of a tile of the elementwise kernels
PROGRAMS = 2048  # of a weight gradient, about


def _row(table: dict[Any, Any], tensor: Tensor, *key: int) -> Any:
    """The row of a table for the tensor's device."""
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
    below = [known[0] for known in table if known[0] <= 10 * major + minor]
    if not below:
        raise ArgumentError(f"{torch.cuda.get_device_name(tensor.device)}: the fused kernels need compute capability 8.0")
    return table[(max(below), *key, tensor.element_size())]


def forms(x: Tensor, kernel_size: int) -> list[Direct | Banded]:
    """The table's form of the depthwise convolution for x, then the other one where there is one for x's type."""
    chosen: Direct | Banded = _row(DEPTHWISE, x, kernel_size)
    others = [config for config in CANDIDATES["depthwise"] if type(config) is not type(chosen)]
    return [chosen, *others[: 1 if x.element_size() == 2 else 0]]


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _tail(u):
    """|u|, exp(-u²/2) and the tail of the normal distribution above |u|."""
    size = tl.abs(u)
    root = 1.0 + 0.2316419 * size
    t = tl.rsqrt(root * root)  # 1/root: cheaper than a division
    e = tl.exp2(u * -0.7213475204444817 * u)
    series = 0.12741479567 + t * (-0.14224837336 + t * (0.71070687056 + t * (-0.72657601347 + t * 0.53070271413)))
    return size, e, e * (t * series)


@triton.jit
def _activate(u, ACT: tl.constexpr):
    if ACT == "gelu":
        size, _, tail = _tail(u)
        return tl.maximum(u, 0.0) - size * tail
    elif ACT == "relu":
        return tl.where(u < 0, 0.0, u)  # NaN stays
    else:
        return u


@triton.jit
def _activate_grad(u, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "gelu":
        size, e, tail = _tail(u)
        return tl.maximum(u, 0.0) - size * tail, tl.where(u < 0, tail, 1.0 - tail) + u * e * 0.3989422804014327
    elif ACT == "relu":
        return tl.where(u < 0, 0.0, u), tl.where(u > 0, 1.0, 0.0)
    else:
        return u, tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def _finish(
    value, offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT: tl.constexpr
):
    """Bias, activation and what follows of one tile of outputs; stores it, and returns what it adds to the sums."""
    if bias is not None:
        value += tl.load(bias + channel, mask=fits, other=0.0)
    if center is not None:
        c = value.to(y.dtype.element_ty)
        tl.store(y + offset, c, mask=ok)
        a = _activate(c.to(tl.float32), ACT) - tl.load(center + channel, mask=fits, other=0.0)
        return tl.where(ok, a, 0.0)
    else:
        a = _activate(value, ACT)
        if scale is not None:
            a *= tl.load(scale + channel, mask=fits, other=0.0)
        if shift is not None:
            a += tl.load(shift + channel, mask=fits, other=0.0)
        if residual is not None:
            a += tl.load(residual + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(y + offset, a.to(y.dtype.element_ty), mask=ok)
        return a


@triton.jit
def _direct(
    x, weight, bias, center, scale, shift, residual, y, sums, H, W, tiles_h, tiles_w,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr,
    COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile_w = program % tiles_w
    tile_h = program // tiles_w % tiles_h
    image = (program // tiles_w // tiles_h).to(tl.int64) * H * W
    group = tl.arange(0, DOWN * ACROSS)[:, None]
    h = tile_h * DOWN + group // ACROSS
    w = (tile_w * ACROSS + group % ACROSS) * COLUMNS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    fits = channel < C
    acc = ()
    for t in tl.static_range(COLUMNS):
        acc = acc + (tl.zeros((DOWN * ACROSS, CHANNELS), tl.float32),)
    for i in range(K):
        taps = ()
        for j in tl.static_range(K):
            at = (K - 1 - i) * K + (K - 1 - j) if FLIP else i * K + j
            taps = taps + (tl.load(weight + (at * C + channel), mask=fits, other=0.0).to(tl.float32),)
        row = h + (i - BEFORE)
        start = x + (image + row.to(tl.int64) * W + (w - BEFORE)) * C + channel
        inside = fits & (row >= 0) & (row < H)
        for s in tl.static_range(COLUMNS + K - 1):
            column = w + (s - BEFORE)
            value = tl.load(start + s * C, mask=inside & (column >= 0) & (column < W), other=0.0).to(tl.float32)
            updated = ()
            for t in tl.static_range(COLUMNS):
                if s - t >= 0 and s - t < K:
                    updated = updated + (tl.fma(value, taps[s - t], acc[t]),)
                else:
                    updated = updated + (acc[t],)
            acc = updated
    first = tl.zeros((DOWN * ACROSS, CHANNELS), tl.float32)
    second = first
    for t in tl.static_range(COLUMNS):
        offset = (image + h.to(tl.int64) * W + w + t) * C + channel
        ok = fits & (h < H) & (w + t < W)
        a = _finish(acc[t], offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT)
        if center is not None:
            first += a
            second += a * a
    if center is not None:
        out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        partial = sums + program.to(tl.int64) * C + out
        tl.store(partial, tl.sum(first, 0), mask=out < C)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(second, 0), mask=out < C)


@triton.jit
def _banded(
    x, weight, bias, center, scale, shift, residual, y, sums, H, W, strips, strip_rows, lanes, tiles_w,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # A lane is one strip of rows of one image. Dimensions: channels, lanes, columns.
    program = tl.program_id(0)
    lane = program // tiles_w * 16 + tl.arange(0, 16)[None, :, None]
    image = (lane // strips).to(tl.int64) * H * W
    top = lane % strips * strip_rows
    left = program % tiles_w * OUTPUTS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    fits = channel < C
    tap = tl.arange(0, INPUTS)[None, :, None] - tl.arange(0, OUTPUTS)[None, None, :]
    bands = ()
    acc = ()
    for i in tl.static_range(K):
        at = K * K - 1 - i * K - tap if FLIP else i * K + tap
        band = tl.load(weight + (at * C + channel), mask=fits & (tap >= 0) & (tap < K), other=0.0)
        bands = bands + (band.to(x.dtype.element_ty),)
        acc = acc + (tl.zeros((CHANNELS, 16, OUTPUTS), tl.float32),)
    first = tl.zeros((CHANNELS, 16, OUTPUTS), tl.float32)
    second = first
    column = left - BEFORE + tl.arange(0, INPUTS)[None, None, :]
    inside = fits & (lane < lanes) & (column >= 0) & (column < W)
    w = left + tl.arange(0, OUTPUTS)[None, None, :]
    for step in range(strip_rows + K - 1):
        row = top + (step - BEFORE)
        offset = (image + row.to(tl.int64) * W + column) * C + channel
        value = tl.load(x + offset, mask=inside & (row >= 0) & (row < H), other=0.0)
        # acc[i] is the output row that this input row reaches through kernel row i; the last one is complete.
        updated = ()
        for i in tl.static_range(K):
            updated = updated + (tl.dot(value, bands[i], acc[i], input_precision="ieee"),)
        h = top + (step - K + 1)
        ok = fits & (lane < lanes) & (h >= top) & (h < H) & (w < W)
        offset = (image + h.to(tl.int64) * W + w) * C + channel
        a = _finish(updated[K - 1], offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT)
        if center is not None:
            first += a
            second += a * a
        acc = (tl.zeros((CHANNELS, 16, OUTPUTS), tl.float32),) + updated[: K - 1]
    if center is not None:
        out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        partial = sums + program.to(tl.int64) * C + out
        tl.store(partial, tl.sum(tl.sum(first, 2), 1), mask=out < C)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(tl.sum(second, 2), 1), mask=out < C)


@triton.jit
def _weight_gradient(
    x, grad, sums, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, GROUPS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    fits = channel < C
    first_row = tl.program_id(2) * KERNEL_ROWS
    total = tl.zeros((GROUPS, CHANNELS), tl.float32)
    acc = ()
    for t in tl.static_range(KERNEL_ROWS * K):
        acc = acc + (tl.zeros((GROUPS, CHANNELS), tl.float32),)
    for turn in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        w = tile % tiles_w * COLUMNS + group * 0  # one for each group, as h
        h = tile // tiles_w % tiles_h * GROUPS + group
        image = (tile // tiles_w // tiles_h).to(tl.int64) * H * W
        start = grad + (image + h.to(tl.int64) * W + w) * C + channel
        grads = ()
        for t in tl.static_range(COLUMNS):
            value = tl.load(start + t * C, mask=fits & (h < H) & (w + t < W), other=0.0).to(tl.float32)
            grads = grads + (value,)
            total += value
        for i in tl.static_range(KERNEL_ROWS):
            row = h + (first_row + i - BEFORE)
            start = x + (image + row.to(tl.int64) * W + (w - BEFORE)) * C + channel
            inside = fits & (row >= 0) & (row < H)
            for s in tl.static_range(COLUMNS + K - 1):
                column = w + (s - BEFORE)
                value = tl.load(start + s * C, mask=inside & (column >= 0) & (column < W), other=0.0).to(tl.float32)
                updated = ()
                for t in tl.static_range(KERNEL_ROWS * K):
                    if t // K == i and s - t % K >= 0 and s - t % K < COLUMNS:
                        updated = updated + (tl.fma(value, grads[s - t % K], acc[t]),)
                    else:
                        updated = updated + (acc[t],)
                acc = updated
    out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    partial = sums + tl.program_id(0).to(tl.int64) * (K * K + 1) * C + out
    for t in tl.static_range(KERNEL_ROWS * K):
        at = first_row * K + t
        tl.store(partial + at * C, tl.sum(acc[t], 0), mask=(out < C) & (at + out * 0 < K * K))
    tl.store(partial + K * K * C, tl.sum(total, 0), mask=(out < C) & (first_row + out * 0 == 0))


@triton.jit
def _pointwise(
    c, scale1, shift1, x, weight, bias, center, scale, shift, u, sums, M,
    C: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # Programs of the same positions come one after the other: the positions are then read from the L2 cache.
    across: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0) // across
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * OUTPUTS + tl.arange(0, OUTPUTS)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, C, INPUTS):
        k = start + tl.arange(0, INPUTS)
        inside = (m < M)[:, None] & (k < C)[None, :]
        offset = m[:, None] * C + k[None, :]
        z = tl.load(c + offset, mask=inside, other=0.0)
        if x is not None:
            gain = tl.load(scale1 + k, mask=k < C, other=0.0)[None, :]
            a = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            a += tl.load(shift1 + k, mask=k < C, other=0.0)[None, :]
            z = tl.fma(gain, _activate(z.to(tl.float32), ACT), a).to(c.dtype.element_ty)
        taps = tl.load(weight + n[None, :] * C + k[:, None], mask=(n < OUT)[None, :] & (k < C)[:, None], other=0.0)
        acc = tl.dot(z, taps, acc, input_precision="tf32x3")
    if bias is not None:
        acc += tl.load(bias + n, mask=n < OUT, other=0.0)[None, :]
    ok = (m < M)[:, None] & (n < OUT)[None, :]
    offset = m[:, None] * OUT + n[None, :]
    if center is not None:
        r = acc.to(u.dtype.element_ty)
        tl.store(u + offset, r, mask=ok)
        a = _activate(r.to(tl.float32), ACT) - tl.load(center + n, mask=n < OUT, other=0.0)[None, :]
        a = tl.where(ok, a, 0.0)
        partial = sums + tile.to(tl.int64) * OUT + n
        tl.store(partial, tl.sum(a, 0), mask=n < OUT)
        tl.store(partial + (tl.num_programs(0) // across).to(tl.int64) * OUT, tl.sum(a * a, 0), mask=n < OUT)
    else:
        a = _activate(acc, ACT)
        if scale is not None:
            a *= tl.load(scale + n, mask=n < OUT, other=0.0)[None, :]
        if shift is not None:
            a += tl.load(shift + n, mask=n < OUT, other=0.0)[None, :]
        tl.store(u + offset, a.to(u.dtype.element_ty), mask=ok)


@triton.jit
def _normalize(
    u, scale, shift, grad, out, sums, M, C: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    ok = (m < M) & (n < C)[None, :]
    offset = m * C + n[None, :]
    value = tl.load(u + offset, mask=ok, other=0.0).to(tl.float32)
    gain = tl.load(scale + n, mask=n < C, other=0.0)[None, :]
    if grad is not None:
        a, slope = _activate_grad(value, ACT)
        above = tl.load(grad + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + offset, (above * gain * slope).to(out.dtype.element_ty), mask=ok)
        partial = sums + tl.program_id(0).to(tl.int64) * C + n
        tl.store(partial, tl.sum(above * a, 0), mask=n < C)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(above, 0), mask=n < C)
    else:
        a = tl.fma(_activate(value, ACT), gain, tl.load(shift + n, mask=n < C, other=0.0)[None, :])
        tl.store(out + offset, a.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _stats_gradient(
    grad, u, center, grad_s, grad_q, out, M, C: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    ok = (m < M) & fits[None, :]
    offset = m * C + n[None, :]
    a, slope = _activate_grad(tl.load(u + offset, mask=ok, other=0.0).to(tl.float32), ACT)
    a -= tl.load(center + n, mask=fits, other=0.0)[None, :]
    twice = 2.0 * tl.load(grad_q + n, mask=fits, other=0.0)[None, :]
    push = tl.fma(a, twice, tl.load(grad_s + n, mask=fits, other=0.0)[None, :])
    above = tl.load(grad + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + offset, tl.fma(slope, push, above).to(out.dtype.element_ty), mask=ok)


INTERPRETED = not isinstance(_direct, triton.JITFunction)  # TRITON_INTERPRET=1 when this module was imported


# ---- operators ------------------------------------------------------------------------------------------------------


def _require(first: Tensor, act: str | None = None, **others: Tensor | None) -> None:
    """Raise ArgumentError unless the kernels can compute the first tensor, and the others have its shape and device."""
    if not (first.is_cuda or INTERPRETED):
        raise ArgumentError(
            f"a tensor on {first.device}: the Triton kernels run on CUDA devices; convmixer.ops.reference runs anywhere"
        )
    if first.dim() != 4:
        raise ArgumentError(f"a tensor of shape {tuple(first.shape)}: (B, C, H, W) is needed")
    if act is not None and act not in ACTIVATIONS:
        raise ArgumentError(f"act={act!r}: the Triton kernels know {', '.join(ACTIVATIONS)}")
    for name, tensor in {"input": first, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{name} of {tensor.dtype}: the Triton kernels compute in bfloat16, float16 or float32")
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ArgumentError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: {tuple(first.shape)} on {first.device} is needed"
            )


def _vector(name: str, vector: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """A vector of one float32 per channel, checked."""
    if vector is None:
        return None
    if vector.shape != (length,) or vector.device != x.device:
        raise ArgumentError(f"{name} of shape {tuple(vector.shape)} on {vector.device}: ({length},) on {x.device} is needed")
    return vector.detach().float().contiguous()


def _kernel(weight: Tensor, x: Tensor) -> Tensor:
    """A depthwise kernel (C, 1, k, k), checked, as (k, k, 1, C): channels side by side as in the activations."""
    if weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[2] != weight.shape[3]:
        raise ArgumentError(f"weight of shape {tuple(weight.shape)}: ({x.shape[1]}, 1, k, k) is needed")
    _size(weight.shape[-1])
    if weight.device != x.device or weight.dtype not in DTYPES:
        raise ArgumentError(f"weight of {weight.dtype} on {weight.device}: a float type on {x.device} is needed")
    return weight.detach().permute(2, 3, 1, 0).contiguous()


def _size(kernel_size: int) -> None:
    if kernel_size not in KERNEL_SIZES:
        raise ArgumentError(f"kernel_size={kernel_size}: the Triton kernels take {KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}")


def _last(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int | None = None) -> Tensor:
    """An output (B, channels, H, W) in channels_last, of x's type."""
    shape = (x.shape[0], channels or x.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    if min(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    transpose: bool = False,
    config: Direct | Banded | None = None,
) -> tuple[Tensor, Tensor]:
    """The depthwise convolution or its transpose, and what follows; with `center` the partial sums (2, programs, C)."""
    _require(x, act, residual=residual)
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    taps = _kernel(weight, x)
    vectors = [
        _vector(name, vector, channels, x)
        for name, vector in {"bias": bias, "center": center, "scale": scale, "shift": shift}.items()
    ]
    config = config or _row(DEPTHWISE, x, size)
    y = _empty(x)
    constants: dict[str, Any] = {
        "C": channels,
        "K": size,
        "BEFORE": size // 2 if transpose else (size - 1) // 2,
        "FLIP": transpose,
        "ACT": act,
        "CHANNELS": config.channels,
    }
    places: tuple[int, ...]
    if isinstance(config, Direct):
        tiles_h, tiles_w = -(-height // config.down), -(-width // (config.across * config.columns))
        programs, places = batch * tiles_h * tiles_w, (tiles_h, tiles_w)
        constants |= {"COLUMNS": config.columns, "DOWN": config.down, "ACROSS": config.across}
    else:
        strips, rows, inputs, outputs = _strips(batch, height, size, config.rows)
        tiles_w = -(-width // outputs)
        programs, places = -(-batch * strips // 16) * tiles_w, (strips, rows, batch * strips, tiles_w)
        constants |= {"INPUTS": inputs, "OUTPUTS": outputs}
    sums = None if center is None else _floats(x, 2, programs, channels)
    _launch(
        _direct if isinstance(config, Direct) else _banded,
        (programs, -(-channels // config.channels)),
        *(_last(x), taps, *vectors, None if residual is None else _last(residual), y, sums, height, width, *places),
        warps=config.warps,
        **constants,
    )
    return y, x.new_empty(0) if sums is None else sums


def _strips(batch: int, height: int, size: int, rows: int) -> tuple[int, int, int, int]:
    """Strips of an image and their rows, at least 16 strips in all where there are so many rows; inputs, outputs."""
    strips = max(-(-height // rows), min(height, -(-16 // max(batch, 1))))
    return strips, -(-height // strips), *((16, 8) if size < 10 else (32, 16))


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator of `torch.ops.convmixer`, which compilers and exporters take as a whole."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"convmixer::triton_{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return operator(*arguments, **named)

        return call

    return register


@_operator("(Tensor u, Tensor scale, Tensor shift, str act) -> Tensor", lambda u, scale, shift, act: _empty(u))
def normalize_act(u: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """`scale*act(u) + shift`, (B, C, H, W) of u's type."""
    _require(u, act)
    batch, channels, height, width = u.shape
    rows, out = batch * height * width, _empty(u)
    scale, shift = _vector("scale", scale, channels, u), _vector("shift", shift, channels, u)
    grid, constants = _elementwise(rows, channels)
    _launch(_normalize, grid, _last(u), scale, shift, None, out, None, rows, ACT=act, **constants)
    return out


@_operator(
    "(Tensor grad, Tensor u, Tensor scale, str act) -> (Tensor, Tensor, Tensor)",
    lambda grad, u, scale, act: (_empty(u), _floats(u, u.shape[1]), _floats(u, u.shape[1])),
)
def normalize_act_grad(grad: Tensor, u: Tensor, scale: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalize_act` with respect to u (of u's type), scale and shift (float32)."""
    _require(u, act, grad=grad)
    batch, channels, height, width = u.shape
    rows, out = batch * height * width, _empty(u)
    grid, constants = _elementwise(rows, channels)
    sums = _floats(u, 2, grid[0], channels)
    scale = _vector("scale", scale, channels, u)
    _launch(_normalize, grid, _last(u), scale, None, _last(grad), out, sums, rows, ACT=act, **constants)
    return out, sums[0].sum(0), sums[1].sum(0)


@_operator(
    "(Tensor grad_u, Tensor u, str act, Tensor center, Tensor grad_s, Tensor grad_q) -> Tensor",
    lambda grad_u, u, act, center, grad_s, grad_q: _empty(u),
)
def stats_grad(grad_u: Tensor, u: Tensor, act: str, center: Tensor, grad_s: Tensor, grad_q: Tensor) -> Tensor:
    """`grad_u + act'(u)*(grad_s + 2*(act(u) - center)*grad_q)`, of u's type: what the two sums add to a gradient."""
    _require(u, act, grad_u=grad_u)
    batch, channels, height, width = u.shape
    rows, out = batch * height * width, _empty(u)
    named = {"center": center, "grad_s": grad_s, "grad_q": grad_q}
    vectors = [_vector(name, vector, channels, u) for name, vector in named.items()]
    grid, constants = _elementwise(rows, channels)
    _launch(_stats_gradient, grid, _last(grad_u), _last(u), *vectors, out, rows, ACT=act, **constants)
    return out


def _elementwise(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    grid = -(-rows // ROWS), -(-channels // CHANNELS)
    return grid, {"C": channels, "ROWS": ROWS, "CHANNELS": CHANNELS, "warps": 4}


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, str act, Tensor center) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias, act, center: (_empty(x), _floats(x, x.shape[1]), _floats(x, x.shape[1])),
)
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise "same" convolution and sums of its activation in one pass.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k from 3 to 11.
        bias: (C,) or None.
        act: "gelu", "relu" or "identity".
        center: (C,), about the mean of `act(c)`: it guards the sums against cancellation.

    Returns:
        c: (B, C, H, W) of x's type; s: (C,), sum of `act(c) - center` over B, H, W; q: (C,), sum of its squares.
    """
    c, sums = _convolve(x, weight, bias, act, center=center)
    return c, sums[0].sum(0), sums[1].sum(0)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, str act, Tensor? scale, Tensor? shift, Tensor? residual) -> Tensor",
    lambda x, weight, bias, act, scale, shift, residual: _empty(x),
)
def depthwise_infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`scale*act(depthwise(x) + bias) + shift + residual` in one pass; what is None is left out."""
    return _convolve(x, weight, bias, act, scale=scale, shift=shift, residual=residual)[0]


@_operator("(Tensor grad, Tensor weight) -> Tensor", lambda grad, weight: _empty(grad))
def depthwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the depthwise convolution with respect to its input, of grad's type."""
    return _convolve(grad, weight, None, "identity", transpose=True)[0]


def _fake_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return _floats(x, channels, 1, kernel_size, kernel_size), _floats(x, channels)


@_operator("(Tensor x, Tensor grad, int kernel_size) -> (Tensor, Tensor)", _fake_weight_grad)
def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise convolution with respect to weight (C, 1, k, k) and bias (C,), in float32."""
    return _correlate(x, grad, kernel_size)


def _correlate(x: Tensor, grad: Tensor, size: int, config: Gradient | None = None) -> tuple[Tensor, Tensor]:
    _require(x, grad=grad)
    _size(size)
    batch, channels, height, width = x.shape
    config = config or _row(WEIGHT_GRADIENT, x, size)
    tiles_h, tiles_w = -(-height // config.groups), -(-width // config.columns)
    tiles, blocks, parts = batch * tiles_h * tiles_w, -(-channels // config.channels), -(-size // config.kernel_rows)
    programs = min(tiles, -(-PROGRAMS // (blocks * parts)))
    sums = _floats(x, programs, size * size + 1, channels)
    _launch(
        _weight_gradient,
        (programs, blocks, parts),
        *(_last(x), _last(grad), sums, height, width, tiles_h, tiles_w, tiles),
        C=channels,
        K=size,
        BEFORE=(size - 1) // 2,
        KERNEL_ROWS=config.kernel_rows,
        COLUMNS=config.columns,
        GROUPS=config.groups,
        CHANNELS=config.channels,
        warps=config.warps,
    )
    total = sums.sum(0)
    return total[:-1].t().reshape(channels, 1, size, size).contiguous(), total[-1].clone()


def _multiply(
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    prologue: tuple[Tensor, Tensor, Tensor] | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    config: Product | None = None,
) -> tuple[Tensor, Tensor]:
    """The 1x1 convolution and what follows, of c or of `scale1*act(c) + shift1 + x`; with `center` partial sums."""
    scale1, shift1, x = prologue or (None, None, None)
    _require(c, act, x=x)
    batch, channels, height, width = c.shape
    if weight.dim() != 2 or weight.shape[1] != channels or weight.device != c.device:
        raise ArgumentError(
            f"weight of shape {tuple(weight.shape)} on {weight.device}: (outputs, {channels}) on {c.device} is needed"
        )
    outputs = weight.shape[0]
    before = [_vector(n, v, channels, c) for n, v in {"scale1": scale1, "shift1": shift1}.items()]
    after = [
        _vector(name, vector, outputs, c)
        for name, vector in {"bias": bias, "center": center, "scale": scale, "shift": shift}.items()
    ]
    config = config or _row(POINTWISE, c, int(x is not None))
    u, rows = _empty(c, outputs), batch * height * width
    tiles = -(-rows // config.rows)
    sums = None if center is None else _floats(c, 2, tiles, outputs)
    _launch(
        _pointwise,
        (tiles * -(-outputs // config.outputs),),
        *(_last(c), *before, None if x is None else _last(x), weight.detach().to(c.dtype).contiguous(), *after),
        *(u, sums, rows),
        C=channels,
        OUT=outputs,
        ACT=act,
        ROWS=config.rows,
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        warps=config.warps,
        stages=config.stages,
    )
    return u, c.new_empty(0) if sums is None else sums


@_operator(
    "(Tensor c, Tensor scale1, Tensor shift1, Tensor x, Tensor weight, Tensor? bias, str act, Tensor center)"
    " -> (Tensor, Tensor, Tensor)",
    lambda c, scale1, shift1, x, weight, bias, act, center: (
        _empty(c, weight.shape[0]),
        _floats(c, weight.shape[0]),
        _floats(c, weight.shape[0]),
    ),
)
def pointwise(
    c: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    center: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution of `z = scale1*act(c) + shift1 + x`, which is never stored, and sums of its activation.

    Args:
        c, x: (B, C, H, W).
        scale1, shift1: (C,).
        weight: (O, C), taken in c's type.
        bias: (O,) or None.
        act: Before and after the product: "gelu", "relu" or "identity".
        center: (O,), about the mean of `act(u)`.

    Returns:
        u: `weight z + bias`, (B, O, H, W) of c's type; s, q: (O,), as of `depthwise`.
    """
    u, sums = _multiply(c, weight, bias, act, (scale1, shift1, x), center)
    return u, sums[0].sum(0), sums[1].sum(0)


@_operator(
    "(Tensor z, Tensor weight, Tensor? bias, str act, Tensor? scale, Tensor? shift) -> Tensor",
    lambda z, weight, bias, act, scale, shift: _empty(z, weight.shape[0]),
)
def pointwise_infer(
    z: Tensor, weight: Tensor, bias: Tensor | None, act: str, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """`scale*act(weight z + bias) + shift`, (B, O, H, W) of z's type; what is None is left out."""
    return _multiply(z, weight, bias, act, scale=scale, shift=shift)[0]
