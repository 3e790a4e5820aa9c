"""The Triton kernels that `launch.py` launches; that module says what they compute and how.

Tuples of blocks are registers of a thread, indexed by loops that the compiler unrolls. A pointer, `*_ptr`, may be None,
and what needs it is then compiled away. In formulas each name stands for the tensor that its pointer points to.

Shapes: B images of H x W positions with C channels, channels last, so that position (b, h, w) is row
(b*H + h)*W + w of M = B*H*W rows. Names in capitals are constants of the compiled kernel; ROWS, COLUMNS, CHANNELS,
OUTPUTS and INPUTS are sides of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _tail(u):
    """Return |u|, exp(-u²/2) and Q(|u|), the tail of the normal distribution above |u|; all of the shape of u.

    Q(|u|) = exp(-u²/2) * t * (b1 + t*(b2 + ... + t*b5)) / sqrt(2*pi) with t = 1 / (1 + 0.2316419*|u|), by Abramowitz &
    Stegun 26.2.17: within 7.5e-8.
    """
    size = tl.abs(u)
    root = 1.0 + 0.2316419 * size
    t = tl.rsqrt(root * root)  # 1/root: cheaper than a division
    e = tl.exp2(u * -0.7213475204444817 * u)
    series = 0.12741479567 + t * (-0.14224837336 + t * (0.71070687056 + t * (-0.72657601347 + t * 0.53070271413)))
    return size, e, e * (t * series)


@triton.jit
def _normal(u):
    """Return the normal distribution up to u, within 1.4e-4, in the shape of u.

    P(u) = 1/2 + v*p(v²), a polynomial in v = u cut to [-4.2, 4.2]: special functions would take twice the time.
    """
    v = tl.minimum(tl.maximum(u, -4.2), 4.2)
    s = v * v
    low = 3.98465900e-01 + s * (-6.55282412e-02 + s * (9.29824852e-03 + s * -9.50661885e-04))
    high = 6.68912236e-05 + s * (-3.03796616e-06 + s * (7.94145600e-08 + s * -9.01769046e-10))
    return tl.fma(v, tl.fma(s * s, s * s * high, low), 0.5)


@triton.jit
def _activate(u, ACT: tl.constexpr, EXACT: tl.constexpr):
    """Return act(u) in the shape of u, float32: with EXACT to the resolution of float32, else to that of 16 bits.

    gelu: u*P(u), computed as max(u, 0) - |u|*Q(|u|) with EXACT. relu: max(u, 0). identity: u.
    """
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
    """Return act(u) and act'(u), each in the shape of u, float32.

    gelu: act'(u) = P(u) + u*exp(-u²/2)/sqrt(2*pi). relu: 1 where u > 0, else 0. identity: 1.
    """
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
def _finish(
    value, offset, ok, channel, fits, bias_ptr, center_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Store a tile of outputs after bias and activation; return what it adds to the sums, in the tile's shape.

        with center     y = value + bias                                          returns act(y) - center, 0 outside
        without         y = scale*act(value + bias) + shift + residual            returns y

    value, ok and offset, of the element in y: (positions, channels) of the tile. channel and fits: (1, channels).
    Vectors (C,); y and residual are whole tensors.
    """
    exact: tl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 32
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channel, mask=fits, other=0.0)
    if center_ptr is not None:
        c = value.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, c, mask=ok)
        a = _activate(c.to(tl.float32), ACT, exact) - tl.load(center_ptr + channel, mask=fits, other=0.0)
        return tl.where(ok, a, 0.0)
    else:
        a = _activate(value, ACT, exact)
        if scale_ptr is not None:
            a *= tl.load(scale_ptr + channel, mask=fits, other=0.0)
        if shift_ptr is not None:
            a += tl.load(shift_ptr + channel, mask=fits, other=0.0)
        if residual_ptr is not None:
            a += tl.load(residual_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, a.to(y_ptr.dtype.element_ty), mask=ok)
        return a


@triton.jit
def _taps(weight_ptr, i, channel, fits, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """Load row i of the depthwise kernels: K blocks (1, CHANNELS), the weight[i, j] of each channel.

    weight (K, K, C). FLIP: weight[K-1-i, K-1-j], the mirror image, with which a convolution's gradient is one.
    """
    taps = ()
    for j in tl.static_range(K):
        at = (K - 1 - i) * K + (K - 1 - j) if FLIP else i * K + j
        taps = taps + (tl.load(weight_ptr + (at * C + channel), mask=fits, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _add_row(
    x_ptr, row_ok, w, W, taps, acc,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, COLUMNS: tl.constexpr, FULL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add a row of inputs to the rows FIRST to LAST of outputs, and return these.

        acc[t, w] += sum over j of taps[t, j] x[w + j - BEFORE]

    x points to the leftmost input of each group; w, (groups, 1), is the column of its first output. acc is a tuple of
    COLUMNS blocks (groups, CHANNELS) for each row of outputs, taps one of K blocks (1, CHANNELS) for each. FULL: no
    tile reaches over the right border.
    """
    for s in tl.static_range(COLUMNS + K - 1):
        if FULL and s >= BEFORE and s < BEFORE + COLUMNS:
            ok = row_ok
        else:
            ok = row_ok & (w + (s - BEFORE) >= 0) & (w + (s - BEFORE) < W)
        value = tl.load(x_ptr + s * C, mask=ok, other=0.0).to(tl.float32)
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
    x_ptr, weight_ptr, bias_ptr, center_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, sums_ptr,
    H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution: y[h, w] = sum over i, j of weight[i, j] x[h + i - BEFORE, w + j - BEFORE] per channel.

    `_finish` adds bias and activation. With center, sums[0] and sums[1] are the sums of act(y) - center and of its
    square over the positions of each program.

    x, y, residual (B, H, W, C); weight (K, K, C); bias, center, scale, shift (C,); sums (2, programs, C).

    A thread holds ROWS x COLUMNS outputs. It loads each input once and adds it to up to ROWS x K of them. A program
    computes DOWN x ACROSS such groups of CHANNELS channels, tile after tile. FULL: no tile reaches over the right
    border.
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
        corner = x_ptr + (w - BEFORE) * C + channel
        acc = ()
        for t in tl.static_range(ROWS * COLUMNS):
            acc = acc + (tl.zeros((DOWN * ACROSS, CHANNELS), tl.float32),)
        taps = ()
        # Output row r meets input row s of the tile at kernel row s - r.
        for s in tl.static_range(ROWS - 1):
            taps = _taps(weight_ptr, s, channel, fits, C, K, FLIP) + taps
            row = h + (s - BEFORE)
            here = corner + (image + row.to(tl.int64) * W) * C
            row_ok = fits & (row >= 0) & (row < H)
            acc = _add_row(here, row_ok, w, W, taps, acc, C, K, BEFORE, COLUMNS, FULL, 0, s)
        for s in range(ROWS - 1, K):
            current = _taps(weight_ptr, s, channel, fits, C, K, FLIP) + taps
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
            a = _finish(
                acc[t], offset, ok, channel, fits, bias_ptr, center_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, ACT
            )  # fmt: skip
            if center_ptr is not None:
                first += a
                second += a * a
    if center_ptr is not None:
        out = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        partial = sums_ptr + tl.program_id(0).to(tl.int64) * C + out
        tl.store(partial, tl.sum(first, 0), mask=out < C)
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(second, 0), mask=out < C)


@triton.jit
def depthwise_weight_gradient(
    x_ptr, grad_ptr, sums_ptr, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    KERNEL_ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Gradients of a depthwise convolution with respect to weight and bias, as sums over the tiles of each program.

        sums[i*K + j] = sum over h, w of grad[h, w] x[h + i - BEFORE, w + j - BEFORE] per channel
        sums[K*K]     = sum over h, w of grad[h, w]

    x, grad (B, H, W, C); sums (programs, K*K + 1, C).

    A thread holds COLUMNS gradients and the sums of KERNEL_ROWS rows of the kernel. FULL: no tile reaches over the
    right border.
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
        start = grad_ptr + (image + h.to(tl.int64) * W + w) * C + channel
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
            start = x_ptr + (image + row.to(tl.int64) * W + (w - BEFORE)) * C + channel
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
    partial = sums_ptr + tl.program_id(0).to(tl.int64) * (K * K + 1) * C + out
    for t in tl.static_range(KERNEL_ROWS * K):
        at = first_row * K + t
        tl.store(partial + at * C, tl.sum(acc[t], 0), mask=(out < C) & (at + out * 0 < K * K))
    tl.store(partial + K * K * C, tl.sum(total, 0), mask=(out < C) & (first_row + out * 0 == 0))


@triton.jit
def pointwise(
    c_ptr, scale1_ptr, shift1_ptr, x_ptr, weight_ptr, bias_ptr, center_ptr, scale_ptr, shift_ptr, u_ptr, sums_ptr, M,
    C: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """1x1 convolution, a matrix multiplication: u[m] = weight z[m], where z = c, or scale1*act(c) + shift1 + x.

    `_finish` adds bias and activation. With center, sums[0] and sums[1] are the sums of act(u) - center and of its
    square over the positions of each tile.

    c, x (M, C); scale1, shift1 (C,); weight (OUT, C); u (M, OUT); bias, center, scale, shift (OUT,); sums (2, tiles,
    OUT).

    A program computes a tile of ROWS positions x OUTPUTS outputs, in steps of INPUTS channels.
    """
    # Programs of the same positions come one after the other: the positions are then read from the L2 cache.
    exact: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 32
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
        z = tl.load(c_ptr + offset, mask=inside, other=0.0)
        if x_ptr is not None:
            gain = tl.load(scale1_ptr + k, mask=k < C, other=0.0)[None, :]
            a = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            a += tl.load(shift1_ptr + k, mask=k < C, other=0.0)[None, :]
            z = tl.fma(gain, _activate(z.to(tl.float32), ACT, exact), a).to(c_ptr.dtype.element_ty)
        taps = tl.load(weight_ptr + n[None, :] * C + k[:, None], mask=used, other=0.0)
        acc = tl.dot(z, taps, acc, input_precision="tf32x3")
    outputs, fits = n[None, :], (n < OUT)[None, :]
    offset = m[:, None] * OUT + outputs
    ok = (m < M)[:, None] & fits
    a = _finish(acc, offset, ok, outputs, fits, bias_ptr, center_ptr, scale_ptr, shift_ptr, None, u_ptr, ACT)
    if center_ptr is not None:
        partial = sums_ptr + tile.to(tl.int64) * OUT + n
        tl.store(partial, tl.sum(a, 0), mask=n < OUT)
        tl.store(partial + (tl.num_programs(0) // across).to(tl.int64) * OUT, tl.sum(a * a, 0), mask=n < OUT)


@triton.jit
def normalize(
    u_ptr, bias_ptr, scale_ptr, shift_ptr, x_ptr, scale_x_ptr, shift_x_ptr, out_ptr, M,
    C: tl.constexpr, ACT: tl.constexpr, ACT_X: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Activation and BatchNorm: out = scale*act(u + bias) + shift, plus x, or plus scale_x*act_x(x) + shift_x.

    u, x, out (M, C); bias, scale, shift, scale_x, shift_x (C,). A program computes a tile of ROWS x CHANNELS.
    """
    exact: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 32
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    ok = m < M
    if C % CHANNELS:
        ok = ok & fits[None, :]
    offset = m * C + n[None, :]
    value = tl.load(u_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + n, mask=fits, other=0.0)[None, :]
    a = _activate(value, ACT, exact)
    if scale_ptr is not None:
        a *= tl.load(scale_ptr + n, mask=fits, other=0.0)[None, :]
    if shift_ptr is not None:
        a += tl.load(shift_ptr + n, mask=fits, other=0.0)[None, :]
    if x_ptr is not None:
        other = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        if scale_x_ptr is not None:
            a += tl.load(shift_x_ptr + n, mask=fits, other=0.0)[None, :]
            a = tl.fma(_activate(other, ACT_X, exact), tl.load(scale_x_ptr + n, mask=fits, other=0.0)[None, :], a)
        else:
            a += other
    tl.store(out_ptr + offset, a.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def sums_of_tiles(
    u_ptr, grad_ptr, scale_ptr, center_ptr, grad_s_ptr, grad_q_ptr, out_ptr, sums_ptr, M, tiles,
    C: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One of three functions of act(u) that end in sums per channel; what is given says which one.

        grad, scale     out = grad*scale*act'(u)                                        sums of grad*act(u) and grad
        grad, center    out = grad + act'(u)*(grad_s + 2*(act(u) - center)*grad_q)      sums of out
        center          no output                                     sums of act(u) - center and of its square

    u, grad, out (M, C); scale, center, grad_s, grad_q (C,); sums (2, programs, C), for one sum (1, programs, C).
    A program adds up tiles of ROWS positions x CHANNELS channels, one after the other.
    """
    exact: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 32
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    if scale_ptr is not None:
        gain = tl.load(scale_ptr + n, mask=fits, other=0.0)[None, :]
    else:
        mean = tl.load(center_ptr + n, mask=fits, other=0.0)[None, :]
        if grad_ptr is not None:
            push = tl.load(grad_s_ptr + n, mask=fits, other=0.0)[None, :]
            twice = 2.0 * tl.load(grad_q_ptr + n, mask=fits, other=0.0)[None, :]
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = first
    for turn in range(tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))):
        m = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        ok = m < M
        if C % CHANNELS:
            ok = ok & fits[None, :]
        offset = m * C + n[None, :]
        value = tl.load(u_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        if grad_ptr is not None:
            above = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
            a, slope = _activate_grad(value, ACT, exact)
            if scale_ptr is not None:
                tl.store(out_ptr + offset, (above * gain * slope).to(out_ptr.dtype.element_ty), mask=ok)
                first += above * a
                second += above
            else:
                result = tl.fma(slope, tl.fma(a - mean, twice, push), above).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + offset, result, mask=ok)
                first += tl.where(ok, result.to(tl.float32), 0.0)
        else:
            a = tl.where(ok, _activate(value, ACT, exact) - mean, 0.0)
            first += a
            second += a * a
    partial = sums_ptr + tl.program_id(0).to(tl.int64) * C + n
    tl.store(partial, tl.sum(first, 0), mask=fits)
    if scale_ptr is not None or grad_ptr is None:
        tl.store(partial + tl.num_programs(0).to(tl.int64) * C, tl.sum(second, 0), mask=fits)


@triton.jit
def add_up(partials_ptr, out_ptr, partials, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of partial sums: out[r, n] = sum over p of partials[r, p, n], in the same order in every run.

    partials (R, P, N), P being the number `partials`; out (R, N). A program computes COLUMNS sums of one r, in steps of
    ROWS partial sums.
    """
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = n < N
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, partials, ROWS):
        p = start + tl.arange(0, ROWS)
        offset = (row * partials + p[:, None]) * N + n[None, :]
        total += tl.load(partials_ptr + offset, mask=(p < partials)[:, None] & fits[None, :], other=0.0)
    tl.store(out_ptr + row * N + n, tl.sum(total, 0), mask=fits)


@triton.jit
def expected_mean(
    weight_ptr, bias_ptr, features_ptr, mean_ptr, outputs, inputs,
    ACT: tl.constexpr, GROUPED: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """The activation of a convolution, about its mean, if the input is everywhere its mean `features`.

        mean[o] = act(sum over i of weight[o, i] features[i] + bias[o])
        GROUPED:  act(features[o] * sum over i of weight[o, i] + bias[o])

    weight (outputs, inputs), flattened: inputs counts the taps of a kernel, too; bias, mean (outputs,); features
    (inputs,), with GROUPED (outputs,). A program computes OUTPUTS means, in steps of INPUTS.
    """
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    fits = n < outputs
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        k = start + tl.arange(0, INPUTS)
        ok = fits[:, None] & (k < inputs)[None, :]
        value = tl.load(weight_ptr + n[:, None] * inputs + k[None, :], mask=ok, other=0.0).to(tl.float32)
        if not GROUPED:
            value *= tl.load(features_ptr + k, mask=k < inputs, other=0.0)[None, :]
        total += value
    mean = tl.sum(total, 1)
    if GROUPED:
        mean *= tl.load(features_ptr + n, mask=fits, other=0.0)
    mean += tl.load(bias_ptr + n, mask=fits, other=0.0).to(tl.float32)
    tl.store(mean_ptr + n, _activate(mean, ACT, True), mask=fits)


@triton.jit
def _moments(s_ptr, q_ptr, n, fits, count):
    """Return s/count, the mean relative to the center, and q/count - (s/count)², the variance before it is cut at 0.

    n, fits, and both results: (CHANNELS,).
    """
    offset = tl.load(s_ptr + n, mask=fits, other=0.0) / count
    return offset, tl.load(q_ptr + n, mask=fits, other=0.0) / count - offset * offset


@triton.jit
def affine(
    s_ptr, q_ptr, center_ptr, weight_ptr, bias_ptr, out_ptr, C, count, eps, CHANNELS: tl.constexpr
):  # fmt: skip
    """BatchNorm of values with these sums, as scale and shift: out = (scale, shift, mean, var).

        mean = center + s/count      var = max(q/count - (s/count)², 0)
        scale = weight/sqrt(var + eps)      shift = bias - mean*scale

    s and q: sums over `count` values of value - center and of its square. s, q, center, weight, bias (C,); out (4, C).
    Without weight it is 1, without bias 0.
    """
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    offset, var = _moments(s_ptr, q_ptr, n, fits, count)
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    mean = tl.load(center_ptr + n, mask=fits, other=0.0) + offset
    scale = 1.0 / tl.sqrt_rn(var + eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + n, mask=fits, other=0.0)
    shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + n, mask=fits, other=0.0)
    tl.store(out_ptr + n, scale, mask=fits)
    tl.store(out_ptr + C + n, shift, mask=fits)
    tl.store(out_ptr + 2 * C + n, mean, mask=fits)
    tl.store(out_ptr + 3 * C + n, var, mask=fits)


@triton.jit
def affine_grad(
    grad_scale_ptr, grad_shift_ptr, s_ptr, q_ptr, center_ptr, weight_ptr, out_ptr, C, count, eps,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of `affine` with respect to s, q and weight, given those to scale and shift: out = (s, q, weight).

        root = 1/sqrt(var + eps)                grad_root = weight * (grad_scale - mean*grad_shift)
        grad_var = -root³/2 * grad_root, or 0 where var was cut
        s       (-scale*grad_shift - 2*(s/count)*grad_var) / count
        q       grad_var / count
        weight  root * (grad_scale - mean*grad_shift)

    All vectors (C,); out (3, C). The gradient with respect to bias is grad_shift; mean and var have none.
    """
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    fits = n < C
    offset, var = _moments(s_ptr, q_ptr, n, fits, count)
    root = 1.0 / tl.sqrt_rn(tl.where(var < 0, 0.0, var) + eps)
    scale = root
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + n, mask=fits, other=0.0)
    grad_shift = tl.load(grad_shift_ptr + n, mask=fits, other=0.0)
    mean = tl.load(center_ptr + n, mask=fits, other=0.0) + offset
    grad_scale = tl.load(grad_scale_ptr + n, mask=fits, other=0.0) - mean * grad_shift
    grad_var = tl.where(var < 0, 0.0, -0.5 * root * root * scale * grad_scale)
    tl.store(out_ptr + n, (-grad_shift * scale - 2.0 * offset * grad_var) / count, mask=fits)
    tl.store(out_ptr + C + n, grad_var / count, mask=fits)
    tl.store(out_ptr + 2 * C + n, grad_scale * root, mask=fits)
