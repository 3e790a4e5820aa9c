"""The Triton kernels that `convmixer.ops.triton` launches; that module says what they compute and how.

Tuples of blocks are registers of a thread, indexed by loops that the compiler unrolls. An argument may be None, and
what needs it is then compiled away.
"""

import triton
import triton.language as tl


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
def _finish(value, offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT: tl.constexpr):
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
def depthwise_direct(
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
def depthwise_banded(
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
def depthwise_weight_gradient(
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
def depthwise_weight_gradient_banded(
    x, grad, sums, H, W, strips, lanes, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # A lane is a strip of ROWS rows of one image. Dimensions: channels, lanes, columns; of x channels, columns, lanes.
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    fits = channel < C
    first_row = tl.program_id(2) * KERNEL_ROWS
    total = tl.zeros((CHANNELS, 16, OUTPUTS), tl.float32)
    acc = ()
    for i in tl.static_range(KERNEL_ROWS):
        acc = acc + (tl.zeros((CHANNELS, INPUTS, OUTPUTS), tl.float32),)
    for turn in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        left = tile % tiles_w * OUTPUTS
        lane = tile // tiles_w * 16 + tl.arange(0, 16)[None, :, None]
        w = left + tl.arange(0, OUTPUTS)[None, None, :]
        top = lane % strips * ROWS
        start = grad + (((lane // strips).to(tl.int64) * H + top) * W + w) * C + channel
        inside = fits & (lane < lanes) & (w < W)
        grads = ()
        for r in tl.static_range(ROWS):
            value = tl.load(start + r * W * C, mask=inside & (top + r < H), other=0.0)
            grads = grads + (value,)
            total += value.to(tl.float32)
        lane = tile // tiles_w * 16 + tl.arange(0, 16)[None, None, :]
        place = tl.arange(0, INPUTS)[None, :, None]
        column = left - BEFORE + place
        top = lane % strips * ROWS + (first_row - BEFORE)
        start = x + (((lane // strips).to(tl.int64) * H + top) * W + column) * C + channel
        inside = fits & (lane < lanes) & (column >= 0) & (column < W) & (place < OUTPUTS + K - 1)
        for s in tl.static_range(ROWS + KERNEL_ROWS - 1):
            ok = inside & (top + s >= 0) & (top + s < H)
            value = tl.load(start + s * W * C, mask=ok, other=0.0)
            # Row s of x meets row s - i of grad at kernel row i.
            updated = ()
            for i in tl.static_range(KERNEL_ROWS):
                if s - i >= 0 and s - i < ROWS:
                    updated = updated + (tl.dot(value, grads[s - i], acc[i], input_precision="ieee"),)
                else:
                    updated = updated + (acc[i],)
            acc = updated
    # Column w of grad meets column w + j of x at tap j: each tap is the sum of a diagonal.
    tap = tl.arange(0, INPUTS)[None, :]
    diagonal = tl.minimum(tap[:, :, None] + tl.arange(0, OUTPUTS)[None, None, :], INPUTS - 1)
    diagonal = tl.broadcast_to(diagonal, (CHANNELS, INPUTS, OUTPUTS))
    out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    partial = sums + tl.program_id(0).to(tl.int64) * (K * K + 1) * C + out
    for i in tl.static_range(KERNEL_ROWS):
        value = tl.sum(tl.gather(acc[i], diagonal, 1), 2)
        ok = (out[:, None] < C) & (tap < K) & (first_row + i + tap * 0 < K)
        tl.store(partial[:, None] + ((first_row + i) * K + tap) * C, value, mask=ok)
    tl.store(partial + K * K * C, tl.sum(tl.sum(total, 2), 1), mask=(out < C) & (first_row + out * 0 == 0))


@triton.jit
def pointwise(
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
def normalize(
    u, scale, shift, grad, x, scale_x, shift_x, out, sums, M, C: tl.constexpr, ACT: tl.constexpr, ACT_X: tl.constexpr,
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
        if x is not None:
            other = tl.load(x + offset, mask=ok, other=0.0).to(tl.float32)
            if scale_x is not None:
                a += tl.load(shift_x + n, mask=n < C, other=0.0)[None, :]
                a = tl.fma(_activate(other, ACT_X), tl.load(scale_x + n, mask=n < C, other=0.0)[None, :], a)
            else:
                a += other
        tl.store(out + offset, a.to(out.dtype.element_ty), mask=ok)


@triton.jit
def stats_gradient(
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
