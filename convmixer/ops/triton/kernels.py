"""The Triton kernels that `launch.py` launches; that module says what they compute and how.

Tuples of blocks are registers of a thread, indexed by loops that the compiler unrolls. An argument may be None, and
what needs it is then compiled away. Pointers are named after what they point to.
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
def _normal(u):
    """The normal distribution up to u, within 1.4e-4, by a polynomial: special functions would take twice the time."""
    v = tl.minimum(tl.maximum(u, -4.2), 4.2)
    s = v * v
    low = 3.98465900e-01 + s * (-6.55282412e-02 + s * (9.29824852e-03 + s * -9.50661885e-04))
    high = 6.68912236e-05 + s * (-3.03796616e-06 + s * (7.94145600e-08 + s * -9.01769046e-10))
    return tl.fma(v, tl.fma(s * s, s * s * high, low), 0.5)


@triton.jit
def _activate(u, ACT: tl.constexpr, EXACT: tl.constexpr):
    """The activation: to the resolution of float32, or of 16 bits unless EXACT."""
    if ACT == "gelu":
        if EXACT:
            size, _, tail = _tail(u)
            return tl.maximum(u, 0.0) - size * tail
        else:
            return u * _normal(u)
    elif ACT == "relu":
        return tl.where(u < 0, 0.0, u)  # NaN stays
    else:
        return u


@triton.jit
def _activate_grad(u, ACT: tl.constexpr, EXACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "gelu":
        if EXACT:
            size, e, tail = _tail(u)
            return tl.maximum(u, 0.0) - size * tail, tl.where(u < 0, tail, 1.0 - tail) + u * e * 0.3989422804014327
        else:
            normal = _normal(u)
            return u * normal, tl.fma(u * 0.3989422804014327, tl.exp2(u * -0.7213475204444817 * u), normal)
    elif ACT == "relu":
        return tl.where(u < 0, 0.0, u), tl.where(u > 0, 1.0, 0.0)
    else:
        return u, tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def _finish(value, offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT: tl.constexpr):
    """Bias, activation and what follows of one tile of outputs; stores it, and returns what it adds to the sums."""
    exact: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 32
    if bias is not None:
        value += tl.load(bias + channel, mask=fits, other=0.0)
    if center is not None:
        c = value.to(y.dtype.element_ty)
        tl.store(y + offset, c, mask=ok)
        a = _activate(c.to(tl.float32), ACT, exact) - tl.load(center + channel, mask=fits, other=0.0)
        return tl.where(ok, a, 0.0)
    else:
        a = _activate(value, ACT, exact)
        if scale is not None:
            a *= tl.load(scale + channel, mask=fits, other=0.0)
        if shift is not None:
            a += tl.load(shift + channel, mask=fits, other=0.0)
        if residual is not None:
            a += tl.load(residual + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(y + offset, a.to(y.dtype.element_ty), mask=ok)
        return a


@triton.jit
def _taps(weight, i, channel, fits, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """Row i of the depthwise kernels, or of their mirror images: K blocks (1, CHANNELS)."""
    taps = ()
    for j in tl.static_range(K):
        at = (K - 1 - i) * K + (K - 1 - j) if FLIP else i * K + j
        taps = taps + (tl.load(weight + (at * C + channel), mask=fits, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _add_row(
    x, row_ok, w, W, taps, acc,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add one row of inputs to the rows FIRST to LAST of outputs; `taps` holds K for each, `acc` COLUMNS."""
    for s in tl.static_range(COLUMNS + K - 1):
        if FULL and s >= BEFORE and s < BEFORE + COLUMNS:
            ok = row_ok
        else:
            ok = row_ok & (w + (s - BEFORE) >= 0) & (w + (s - BEFORE) < W)
        value = tl.load(x + s * C, mask=ok, other=0.0).to(tl.float32)
        updated = ()
        for t in tl.static_range(len(acc)):
            if t // COLUMNS >= FIRST and t // COLUMNS <= LAST and s - t % COLUMNS >= 0 and s - t % COLUMNS < K:
                updated = updated + (tl.fma(value, taps[t // COLUMNS * K + s - t % COLUMNS], acc[t]),)
            else:
                updated = updated + (acc[t],)
        acc = updated
    return acc


@triton.jit
def depthwise(
    x, weight, bias, center, scale, shift, residual, y, sums, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """y[h, w] = sum of weight[i, j] x[h + i - BEFORE, w + j - BEFORE] per channel, and what `_finish` does to it.

    x, y, residual (B, H, W, C); weight (K, K, C); sums (2, programs, C). A thread holds ROWS x COLUMNS outputs. It
    loads each input once, and adds it to up to ROWS x K of them. A program computes every tile in its turn. FULL: no
    tile reaches over the right border.
    """
    group = tl.arange(0, DOWN * ACROSS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    fits = tl.full((1, CHANNELS), 1, tl.int1) if C % CHANNELS == 0 else channel < C
    first = tl.zeros((DOWN * ACROSS, CHANNELS), tl.float32)
    second = first
    for turn in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        image = (tile // tiles_w // tiles_h).to(tl.int64) * H * W
        h = (tile // tiles_w % tiles_h * DOWN + group // ACROSS) * ROWS
        w = (tile % tiles_w * ACROSS + group % ACROSS) * COLUMNS
        corner = x + (w - BEFORE) * C + channel
        acc = ()
        for t in tl.static_range(ROWS * COLUMNS):
            acc = acc + (tl.zeros((DOWN * ACROSS, CHANNELS), tl.float32),)
        taps = ()
        # Output row r meets input row s of the tile at kernel row s - r.
        for s in tl.static_range(ROWS - 1):
            taps = _taps(weight, s, channel, fits, C, K, FLIP) + taps
            row = h + (s - BEFORE)
            here = corner + (image + row.to(tl.int64) * W) * C
            row_ok = fits & (row >= 0) & (row < H)
            acc = _add_row(here, row_ok, w, W, taps, acc, C, K, BEFORE, COLUMNS, FULL, 0, s)
        for s in range(ROWS - 1, K):
            current = _taps(weight, s, channel, fits, C, K, FLIP) + taps
            row = h + (s - BEFORE)
            here = corner + (image + row.to(tl.int64) * W) * C
            row_ok = fits & (row >= 0) & (row < H)
            acc = _add_row(here, row_ok, w, W, current, acc, C, K, BEFORE, COLUMNS, FULL, 0, ROWS - 1)
            if ROWS > 1:
                taps = current[: (ROWS - 1) * K]
        for r in tl.static_range(1, ROWS):
            taps = taps[:K] + taps
            row = h + (K - 1 + r - BEFORE)
            here = corner + (image + row.to(tl.int64) * W) * C
            row_ok = fits & (row >= 0) & (row < H)
            acc = _add_row(here, row_ok, w, W, taps, acc, C, K, BEFORE, COLUMNS, FULL, r, ROWS - 1)
            taps = taps[: (ROWS - 1) * K]
        for t in tl.static_range(ROWS * COLUMNS):
            row = h + t // COLUMNS
            offset = (image + row.to(tl.int64) * W + w + t % COLUMNS) * C + channel
            ok = fits & (row < H)
            if not FULL:
                ok = ok & (w + t % COLUMNS < W)
            a = _finish(acc[t], offset, ok, channel, fits, bias, center, scale, shift, residual, y, ACT)
            if center is not None:
                first += a
                second += a * a
    if center is not None:
        out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        partial = sums + tl.program_id(0).to(tl.int64) * C + out
        tl.store(partial, tl.sum(first, 0), mask=out < C)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(second, 0), mask=out < C)


@triton.jit
def depthwise_weight_gradient(
    x, grad, sums, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """sums[i, j] = sum of grad[h, w] x[h + i - BEFORE, w + j - BEFORE] per channel; after them the sum of grad.

    x, grad (B, H, W, C); sums (programs, K*K + 1, C). A thread holds COLUMNS gradients and the sums of KERNEL_ROWS rows
    of the kernel. FULL: no tile reaches over the right border.
    """
    group = tl.arange(0, GROUPS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    fits = tl.full((1, CHANNELS), 1, tl.int1) if C % CHANNELS == 0 else channel < C
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
            ok = fits & (h < H)
            if not FULL:
                ok = ok & (w + t < W)
            value = tl.load(start + t * C, mask=ok, other=0.0).to(tl.float32)
            grads = grads + (value,)
            total += value
        for i in tl.static_range(KERNEL_ROWS):
            row = h + (first_row + i - BEFORE)
            start = x + (image + row.to(tl.int64) * W + (w - BEFORE)) * C + channel
            row_ok = fits & (row >= 0) & (row < H)
            for s in tl.static_range(COLUMNS + K - 1):
                ok = row_ok
                if not FULL or s < BEFORE or s >= BEFORE + COLUMNS:
                    ok = ok & (w + (s - BEFORE) >= 0) & (w + (s - BEFORE) < W)
                value = tl.load(start + s * C, mask=ok, other=0.0).to(tl.float32)
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
def pointwise(
    c, scale1, shift1, x, weight, bias, center, scale, shift, u, sums, M,
    C: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """u = weight z + bias and what follows of it, where z is c, or scale1*act(c) + shift1 + x.

    c, x (M, C); weight (OUT, C); u (M, OUT); sums (2, tiles of ROWS positions, OUT).
    """
    # Programs of the same positions come one after the other: the positions are then read from the L2 cache.
    exact: tl.constexpr = u.dtype.element_ty.primitive_bitwidth == 32
    across: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0) // across
    m = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * OUTPUTS + tl.arange(0, OUTPUTS)
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, C, INPUTS):
        k = start + tl.arange(0, INPUTS)
        inside = (m < M)[:, None]
        used = (n < OUT)[None, :]
        if C % INPUTS:
            inside = inside & (k < C)[None, :]
            used = used & (k < C)[:, None]
        offset = m[:, None] * C + k[None, :]
        z = tl.load(c + offset, mask=inside, other=0.0)
        if x is not None:
            gain = tl.load(scale1 + k, mask=k < C, other=0.0)[None, :]
            a = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
            a += tl.load(shift1 + k, mask=k < C, other=0.0)[None, :]
            z = tl.fma(gain, _activate(z.to(tl.float32), ACT, exact), a).to(c.dtype.element_ty)
        taps = tl.load(weight + n[None, :] * C + k[:, None], mask=used, other=0.0)
        acc = tl.dot(z, taps, acc, input_precision="tf32x3")
    outputs, fits = n[None, :], (n < OUT)[None, :]
    offset = m[:, None] * OUT + outputs
    a = _finish(acc, offset, (m < M)[:, None] & fits, outputs, fits, bias, center, scale, shift, None, u, ACT)
    if center is not None:
        partial = sums + tile.to(tl.int64) * OUT + n
        tl.store(partial, tl.sum(a, 0), mask=n < OUT)
        tl.store(partial + (tl.num_programs(0) // across).to(tl.int64) * OUT, tl.sum(a * a, 0), mask=n < OUT)


@triton.jit
def normalize(
    u, bias, scale, shift, x, scale_x, shift_x, out, M,
    C: tl.constexpr, ACT: tl.constexpr, ACT_X: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = scale*act(u + bias) + shift, and to it x, or scale_x*act_x(x) + shift_x; tensors (M, C), vectors (C,)."""
    exact: tl.constexpr = u.dtype.element_ty.primitive_bitwidth == 32
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    ok = m < M
    if C % CHANNELS:
        ok = ok & fits[None, :]
    offset = m * C + n[None, :]
    value = tl.load(u + offset, mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + n, mask=fits, other=0.0)[None, :]
    a = _activate(value, ACT, exact)
    if scale is not None:
        a *= tl.load(scale + n, mask=fits, other=0.0)[None, :]
    if shift is not None:
        a += tl.load(shift + n, mask=fits, other=0.0)[None, :]
    if x is not None:
        other = tl.load(x + offset, mask=ok, other=0.0).to(tl.float32)
        if scale_x is not None:
            a += tl.load(shift_x + n, mask=fits, other=0.0)[None, :]
            a = tl.fma(_activate(other, ACT_X, exact), tl.load(scale_x + n, mask=fits, other=0.0)[None, :], a)
        else:
            a += other
    tl.store(out + offset, a.to(out.dtype.element_ty), mask=ok)


@triton.jit
def sums_of_tiles(
    u, grad, scale, center, grad_s, grad_q, out, sums, M, tiles,
    C: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Three functions of act(u) that end in sums per channel; which one follows from what is given.

        grad, scale     out = grad*scale*act'(u)                                        sums of grad*act(u) and grad
        grad, center    out = grad + act'(u)*(grad_s + 2*(act(u) - center)*grad_q)      sums of out
        center          no output                                     sums of act(u) - center and of its square

    Tensors (M, C), vectors (C,), sums (2, programs, C). A program adds up every tile of ROWS positions in its turn.
    """
    exact: tl.constexpr = u.dtype.element_ty.primitive_bitwidth == 32
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    if scale is not None:
        gain = tl.load(scale + n, mask=fits, other=0.0)[None, :]
    else:
        mean = tl.load(center + n, mask=fits, other=0.0)[None, :]
        if grad is not None:
            push = tl.load(grad_s + n, mask=fits, other=0.0)[None, :]
            twice = 2.0 * tl.load(grad_q + n, mask=fits, other=0.0)[None, :]
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = first
    for turn in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))):
        m = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        ok = m < M
        if C % CHANNELS:
            ok = ok & fits[None, :]
        offset = m * C + n[None, :]
        value = tl.load(u + offset, mask=ok, other=0.0).to(tl.float32)
        if grad is not None:
            above = tl.load(grad + offset, mask=ok, other=0.0).to(tl.float32)
            a, slope = _activate_grad(value, ACT, exact)
            if scale is not None:
                tl.store(out + offset, (above * gain * slope).to(out.dtype.element_ty), mask=ok)
                first += above * a
                second += above
            else:
                result = tl.fma(slope, tl.fma(a - mean, twice, push), above).to(out.dtype.element_ty)
                tl.store(out + offset, result, mask=ok)
                first += tl.where(ok, result.to(tl.float32), 0.0)
        else:
            a = tl.where(ok, _activate(value, ACT, exact) - mean, 0.0)
            first += a
            second += a * a
    partial = sums + tl.program_id(0).to(tl.int64) * C + n
    tl.store(partial, tl.sum(first, 0), mask=fits)
    if scale is not None or grad is None:
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(second, 0), mask=fits)
