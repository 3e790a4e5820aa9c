"""The operations of a ConvMixer block on CUDA devices, in Triton; `convmixer.ops.reference` has them for any tensor.

Activations are (B, C, H, W) and lie in memory as (B, H, W, C), channels_last; other layouts are accepted and copied
first. They are bfloat16, float16 or float32, all sums are float32. No kernel uses atomics: each program writes its own
partial sums and a second pass adds them, so results do not change from run to run on one GPU.

The depthwise convolution runs on the CUDA cores. A thread holds a tile of neighbouring outputs of two channels in
registers. It loads and converts each input once and uses it for every output of the tile that the input reaches.
Channels lie side by side in memory, so each load of a warp is one line of 128 bytes. (A form on the tensor cores, by
banded matrices, was 1.8 to 3.2 times slower on an H200, and is gone.)

GELU of float32 is `max(u, 0) - |u| Q(|u|)` with the normal distribution's tail Q by Abramowitz & Stegun 26.2.17, whose
error of 7.5e-8 is below float32's resolution of the result. GELU of 16-bit types is a polynomial within 9e-5.

`convmixer.ops.triton.tables` says which tile each kernel computes with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import ArgumentError, DependencyError

try:
    import triton
except ImportError as error:
    raise DependencyError("the fused kernels need triton, which is missing: pip install triton") from error

from convmixer.ops.limits import ACTIVATIONS, DTYPES, KERNEL_SIZES
from convmixer.ops.triton import kernels
from convmixer.ops.triton.tables import Direct, Elementwise, Gemm, Gradient, Library, Sums, pointwise_key, row

INTERPRETED = not isinstance(kernels.normalize, triton.JITFunction)  # TRITON_INTERPRET=1 at the first import
PROGRAMS = 2048  # of a weight gradient, about
WARPS = 8192  # of a convolution with sums, at least: several times what a GPU computes at once


# ---- checks ---------------------------------------------------------------------------------------------------------


def _require(first: Tensor, act: str | None = None, **others: Tensor | None) -> None:
    """Raise ArgumentError unless the kernels can compute the first tensor, and the others have its shape and device."""
    if not (first.is_cuda or INTERPRETED):
        raise ArgumentError(
            f"a tensor on {first.device}: the Triton kernels run on CUDA devices; convmixer.ops.reference runs anywhere"
        )
    if first.dim() != 4:
        raise ArgumentError(f"a tensor of shape {tuple(first.shape)}: (B, C, H, W) is needed")
    if act is not None and act not in ACTIVATIONS.values():
        raise ArgumentError(f"act={act!r}: the Triton kernels know {', '.join(ACTIVATIONS.values())}")
    if first.dtype not in DTYPES:
        raise ArgumentError(f"input of {first.dtype}: the Triton kernels compute in bfloat16, float16 or float32")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{name} of {tensor.dtype}: the Triton kernels compute in bfloat16, float16 or float32")
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ArgumentError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: "
                f"{tuple(first.shape)} on {first.device} is needed"
            )


def _vector(name: str, vector: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """Return a vector of one float32 per channel, checked."""
    if vector is None:
        return None
    if vector.shape != (length,) or vector.device != x.device:
        given = f"{name} of shape {tuple(vector.shape)} on {vector.device}"
        raise ArgumentError(f"{given}: ({length},) on {x.device} is needed")
    if vector.dtype is torch.float32 and vector.is_contiguous():
        return vector
    return vector.detach().float().contiguous()


def _kernel(weight: Tensor, x: Tensor) -> Tensor:
    """Return a checked depthwise kernel (C, 1, k, k) as (k, k, 1, C), with channels next to each other."""
    if weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[2] != weight.shape[3]:
        raise ArgumentError(f"weight of shape {tuple(weight.shape)}: ({x.shape[1]}, 1, k, k) is needed")
    _size(weight.shape[-1])
    if weight.device != x.device or weight.dtype not in DTYPES:
        raise ArgumentError(
            f"weight of {weight.dtype} on {weight.device}: bfloat16, float16 or float32 on {x.device} is needed"
        )
    return weight.detach().permute(2, 3, 1, 0).contiguous()


def _size(kernel_size: int) -> None:
    if kernel_size not in KERNEL_SIZES:
        valid = f"{KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
        raise ArgumentError(f"kernel_size={kernel_size}: the Triton kernels take {valid}")


# ---- launches -------------------------------------------------------------------------------------------------------


def _last(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.detach().contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int | None = None) -> Tensor:
    """Return an output (B, channels, H, W) in channels_last, of x's type."""
    shape = (x.shape[0], channels or x.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def options(warps: int, stages: int) -> dict[str, Any]:
    """Return the options of Triton's compiler for every kernel; `tune` and the benchmarks use the same."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


_COMPILED: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """Launch a kernel; what Triton has compiled for such arguments is called without asking Triton again."""
    if not min(grid):
        return
    device = arguments[0].get_device()
    # What Triton specialises for: types, pointers that are multiples of 16, numbers.
    kinds = ((a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a for a in arguments)
    key = (kernel, device, warps, stages, *constants.values(), *kinds)
    with torch.cuda.device(device):
        compiled = _COMPILED.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))
            return
        compiled = kernel[grid](*arguments, **constants, **options(warps, stages))
        if not INTERPRETED:
            _COMPILED[key] = compiled


def _add_up(sums: Tensor) -> Tensor:
    """Return the sums (R, N) of the partial sums (R, programs, N) that the programs of a kernel have written."""
    rows, partials, length = sums.shape
    total = _floats(sums, rows, length)
    if not partials:
        return total.zero_()
    _launch(kernels.add_up, (-(-length // 8), rows), sums, total, partials, length, ROWS=512, COLUMNS=8, warps=8)
    return total


_LIBRARY = torch.library.Library("convmixer", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator of `torch.ops.convmixer`, which compilers and exporters take as a whole."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"triton_{function.__name__.lstrip('_')}"
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # of any device: some are refused in words
        torch.library.register_fake(f"convmixer::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.convmixer, name).default

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return operator(*arguments, **named)

        return call

    return register


# ---- elementwise ----------------------------------------------------------------------------------------------------


def _normalize(
    u: Tensor,
    act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None = None,
    x: Tensor | None = None,
    scale_x: Tensor | None = None,
    shift_x: Tensor | None = None,
    act_x: str = "identity",
    config: Elementwise | None = None,
) -> Tensor:
    """Compute `scale*act(u + bias) + shift`, plus `x`, or with `scale_x` plus `scale_x*act_x(x) + shift_x`."""
    _require(u, act, x=x)
    _require(u, act_x)
    batch, channels, height, width = u.shape
    positions, out = batch * height * width, _empty(u)
    named = {"bias": bias, "scale": scale, "shift": shift, "scale_x": scale_x, "shift_x": shift_x}
    add, gain, offset, gain_x, offset_x = (_vector(name, v, channels, u) for name, v in named.items())
    config = config or row("normalize", int(x is not None), u)
    _launch(
        kernels.normalize,
        (-(-positions // config.rows), -(-channels // config.channels)),
        *(_last(u), add, gain, offset, None if x is None else _last(x), gain_x, offset_x, out, positions),
        C=channels,
        ACT=act,
        ACT_X=act_x,
        ROWS=config.rows,
        CHANNELS=config.channels,
        warps=config.warps,
    )
    return out


@_operator("(Tensor u, Tensor scale, Tensor shift, str act) -> Tensor", lambda u, scale, shift, act: _empty(u))
def normalize_act(u: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """Compute `scale*act(u) + shift`, (B, C, H, W) of u's type."""
    return _normalize(u, act, scale, shift)


@_operator(
    "(Tensor c, Tensor scale, Tensor shift, str act, Tensor u, Tensor scale_u, Tensor shift_u, str act_u) -> Tensor",
    lambda c, scale, shift, act, u, scale_u, shift_u, act_u: _empty(c),
)
def sum_normalized(
    c: Tensor, scale: Tensor, shift: Tensor, act: str, u: Tensor, scale_u: Tensor, shift_u: Tensor, act_u: str
) -> Tensor:
    """Compute `scale*act(c) + shift + scale_u*act_u(u) + shift_u`, (B, C, H, W) of c's type."""
    return _normalize(c, act, scale, shift, None, u, scale_u, shift_u, act_u)


def _sums(
    what: int,
    u: Tensor,
    act: str,
    grad: Tensor | None = None,
    config: Sums | None = None,
    **vectors: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run `sums_of_tiles` on the vectors given: return its output, which may be empty, and its sums (1 or 2, C)."""
    _require(u, act, grad=grad)
    batch, channels, height, width = u.shape
    positions = batch * height * width
    config = config or row("sums", what, u)
    checked = {name: _vector(name, vector, channels, u) for name, vector in vectors.items()}
    out = None if grad is None else _empty(u)
    tiles, blocks = -(-positions // config.rows), -(-channels // config.channels)
    programs = min(tiles, -(-config.programs // blocks))
    sums = _floats(u, 1 if what == 1 else 2, programs, channels)
    _launch(
        kernels.sums_of_tiles,
        (programs, blocks),
        *(_last(u), None if grad is None else _last(grad)),
        *(checked.get(name) for name in ("scale", "center", "grad_s", "grad_q")),
        *(out, sums, positions, tiles),
        C=channels,
        ACT=act,
        ROWS=config.rows,
        CHANNELS=config.channels,
        warps=config.warps,
    )
    return u.new_empty(0) if out is None else out, _add_up(sums)


@_operator(
    "(Tensor grad, Tensor u, Tensor scale, str act) -> (Tensor, Tensor)",
    lambda grad, u, scale, act: (_empty(u), _floats(u, 2, u.shape[1])),
)
def _normalize_act_grad(grad: Tensor, u: Tensor, scale: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return _sums(0, u, act, grad, scale=scale)


def normalize_act_grad(grad: Tensor, u: Tensor, scale: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize_act` with respect to u (of u's type), scale and shift (float32)."""
    out, sums = _normalize_act_grad(grad, u, scale, act)
    return out, sums[0], sums[1]


@_operator(
    "(Tensor grad_u, Tensor u, str act, Tensor center, Tensor grad_s, Tensor grad_q) -> (Tensor, Tensor)",
    lambda grad_u, u, act, center, grad_s, grad_q: (_empty(u), _floats(u, 1, u.shape[1])),
)
def _stats_grad(
    grad_u: Tensor, u: Tensor, act: str, center: Tensor, grad_s: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    return _sums(1, u, act, grad_u, center=center, grad_s=grad_s, grad_q=grad_q)


def stats_grad(
    grad_u: Tensor, u: Tensor, act: str, center: Tensor, grad_s: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to a gradient what the two sums of `stats` contribute.

    Returns:
        `grad_u + act'(u)*(grad_s + 2*(act(u) - center)*grad_q)`, (B, C, H, W) of u's type, and its sum over B, H and W,
        (C,) in float32.
    """
    out, sums = _stats_grad(grad_u, u, act, center, grad_s, grad_q)
    return out, sums[0]


@_operator(
    "(Tensor u, str act, Tensor center) -> Tensor",
    lambda u, act, center: _floats(u, 2, u.shape[1]),
)
def _stats(u: Tensor, act: str, center: Tensor) -> Tensor:
    return _sums(2, u, act, center=center)[1]


def stats(u: Tensor, act: str, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sum `act(u) - center`, and its square, over B, H and W: (C,) each in float32."""
    sums = _stats(u, act, center)
    return sums[0], sums[1]


# ---- depthwise ------------------------------------------------------------------------------------------------------


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
    config: Direct | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the depthwise convolution or its transpose, and what follows; with `center` the sums (2, C)."""
    _require(x, act, residual=residual)
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    taps = _kernel(weight, x)
    named = {"bias": bias, "center": center, "scale": scale, "shift": shift}
    vectors = [_vector(name, vector, channels, x) for name, vector in named.items()]
    config = config or row("depthwise", size, x)
    y = _empty(x)
    tiles_h, tiles_w = -(-height // (config.rows * config.down)), -(-width // (config.across * config.columns))
    tiles, blocks = batch * tiles_h * tiles_w, -(-channels // config.channels)
    # With sums, a program computes several tiles: there are fewer partial sums to add up.
    programs = tiles if center is None else min(tiles, max(-(-tiles // 8), -(-WARPS // (config.warps * blocks))))
    sums = None if center is None else _floats(x, 2, programs, channels)
    _launch(
        kernels.depthwise,
        (programs, blocks),
        *(_last(x), taps, *vectors, None if residual is None else _last(residual), y, sums),
        *(height, width, tiles_h, tiles_w, tiles),
        C=channels,
        K=size,
        BEFORE=size // 2 if transpose else (size - 1) // 2,
        FLIP=transpose,
        ACT=act,
        ROWS=config.rows,
        COLUMNS=config.columns,
        DOWN=config.down,
        ACROSS=config.across,
        CHANNELS=config.channels,
        FULL=width % (config.across * config.columns) == 0,
        warps=config.warps,
    )
    return y, x.new_empty(0) if sums is None else _add_up(sums)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, str act, Tensor center) -> (Tensor, Tensor)",
    lambda x, weight, bias, act, center: (_empty(x), _floats(x, 2, x.shape[1])),
)
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, center: Tensor) -> tuple[Tensor, Tensor]:
    return _convolve(x, weight, bias, act, center=center)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, center: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the depthwise "same" convolution and the sums of its activation in one pass.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k).
        bias: (C,) or None.
        act: "gelu", "relu" or "identity".
        center: (C,), about the mean of `act(c)`: it guards the sums against cancellation.

    Returns:
        c: (B, C, H, W) of x's type; s: (C,), sum of `act(c) - center` over B, H, W; q: (C,), sum of its squares.
    """
    c, sums = _depthwise(x, weight, bias, act, center)
    return c, sums[0], sums[1]


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
    """Compute `scale*act(depthwise(x) + bias) + shift + residual` in one pass; what is None is left out."""
    return _convolve(x, weight, bias, act, scale=scale, shift=shift, residual=residual)[0]


@_operator(
    "(Tensor grad, Tensor weight, Tensor? residual=None) -> Tensor",
    lambda grad, weight, residual=None: _empty(grad),
)
def depthwise_input_grad(grad: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return the gradient of the depthwise convolution with respect to its input, of grad's type, plus `residual`."""
    return _convolve(grad, weight, None, "identity", residual=residual, transpose=True)[0]


def _fake_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return _floats(x, channels, 1, kernel_size, kernel_size), _floats(x, channels)


@_operator("(Tensor x, Tensor grad, int kernel_size) -> (Tensor, Tensor)", _fake_weight_grad)
def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Return the float32 gradients of the depthwise convolution with respect to weight (C, 1, k, k) and bias (C,)."""
    return _correlate(x, grad, kernel_size)


def _correlate(x: Tensor, grad: Tensor, size: int, config: Gradient | None = None) -> tuple[Tensor, Tensor]:
    _require(x, grad=grad)
    _size(size)
    batch, channels, height, width = x.shape
    config = config or row("weight_gradient", size, x)
    kernel_rows = min(config.kernel_rows, size)
    blocks, parts = -(-channels // config.channels), -(-size // kernel_rows)
    tiles_h, tiles_w = -(-height // config.groups), -(-width // config.columns)
    tiles = batch * tiles_h * tiles_w
    programs = min(tiles, -(-PROGRAMS // (blocks * parts)))
    sums = _floats(x, programs, size * size + 1, channels)
    _launch(
        kernels.depthwise_weight_gradient,
        (programs, blocks, parts),
        *(_last(x), _last(grad), sums, height, width, tiles_h, tiles_w, tiles),
        C=channels,
        K=size,
        BEFORE=(size - 1) // 2,
        KERNEL_ROWS=kernel_rows,
        COLUMNS=config.columns,
        GROUPS=config.groups,
        CHANNELS=config.channels,
        FULL=width % config.columns == 0,
        warps=config.warps,
    )
    total = _add_up(sums.flatten(1)[None]).view(size * size + 1, channels)
    return total[:-1].t().reshape(channels, 1, size, size).contiguous(), total[-1].clone()


# ---- pointwise ------------------------------------------------------------------------------------------------------


def _multiply(
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    prologue: tuple[Tensor, Tensor, Tensor] | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    config: Gemm | Library | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the 1x1 convolution of c or `scale1*act(c) + shift1 + x`, and what follows; with `center` sums (2, O)."""
    scale1, shift1, x = prologue or (None, None, None)
    _require(c, act, x=x)
    batch, channels, height, width = c.shape
    if weight.dim() != 2 or weight.shape[1] != channels or weight.device != c.device:
        raise ArgumentError(
            f"weight of shape {tuple(weight.shape)} on {weight.device}: (outputs, {channels}) on {c.device} is needed"
        )
    outputs = weight.shape[0]
    named = {"bias": bias, "center": center, "scale": scale, "shift": shift}
    after = [_vector(name, vector, outputs, c) for name, vector in named.items()]
    config = config or row("pointwise", pointwise_key(outputs, x is not None), c)
    if x is not None and (isinstance(config, Library) or config.apart):
        c, x = _normalize(c, act, scale1, shift1, x=x), None
    product = weight.detach().to(c.dtype).contiguous()
    if isinstance(config, Library):
        return _by_library(c, product, act, *after)
    named = {} if x is None else {"scale1": scale1, "shift1": shift1}
    before = [_vector(name, vector, channels, c) for name, vector in named.items()] or [None, None]
    u, positions = _empty(c, outputs), batch * height * width
    tiles = -(-positions // config.rows)
    sums = None if center is None else _floats(c, 2, tiles, outputs)
    _launch(
        kernels.pointwise,
        (tiles * -(-outputs // config.outputs),),
        *(_last(c), *before, None if x is None else _last(x), product, *after, u, sums, positions),
        C=channels,
        OUT=outputs,
        ACT=act,
        ROWS=config.rows,
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        warps=config.warps,
        stages=config.stages,
    )
    return u, c.new_empty(0) if sums is None else _add_up(sums)


def _by_library(
    z: Tensor,
    weight: Tensor,
    act: str,
    bias: Tensor | None,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `_multiply` of z by cuBLAS, which adds the bias in training, in z's type; else the pass after it does."""
    flat = _rows(z)
    if center is not None and bias is not None:
        product = torch.addmm(bias.detach().to(z.dtype), flat, weight.t())
    else:
        product = flat @ weight.t()
    u = product.view(z.shape[0], *z.shape[2:], len(weight)).permute(0, 3, 1, 2)
    if center is not None:
        return u, _sums(2, u, act, center=center)[1]
    if act == "identity" and bias is scale is shift is None:
        return u, z.new_empty(0)
    return _normalize(u, act, scale, shift, bias), z.new_empty(0)


@_operator(
    "(Tensor c, Tensor scale1, Tensor shift1, Tensor x, Tensor weight, Tensor? bias, str act, Tensor center)"
    " -> (Tensor, Tensor)",
    lambda c, scale1, shift1, x, weight, bias, act, center: (
        _empty(c, weight.shape[0]),
        _floats(c, 2, weight.shape[0]),
    ),
)
def _pointwise(
    c: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    center: Tensor,
) -> tuple[Tensor, Tensor]:
    return _multiply(c, weight, bias, act, (scale1, shift1, x), center)


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
    """Compute the 1x1 convolution of `z = scale1*act(c) + shift1 + x`, and sums of its activation.

    Args:
        c, x: (B, C, H, W).
        scale1, shift1: (C,).
        weight: (O, C), taken in c's type.
        bias: (O,) or None.
        act: Before and after the convolution: "gelu", "relu" or "identity".
        center: (O,), about the mean of `act(u)`.

    Returns:
        u: `weight z + bias`, (B, O, H, W) of c's type; s, q: (O,), as of `depthwise`.
    """
    u, sums = _pointwise(c, scale1, shift1, x, weight, bias, act, center)
    return u, sums[0], sums[1]


@_operator(
    "(Tensor z, Tensor weight, Tensor? bias, str act, Tensor? scale, Tensor? shift) -> Tensor",
    lambda z, weight, bias, act, scale, shift: _empty(z, weight.shape[0]),
)
def pointwise_infer(
    z: Tensor, weight: Tensor, bias: Tensor | None, act: str, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Compute `scale*act(weight z + bias) + shift`, (B, O, H, W) of z's type; what is None is left out."""
    return _multiply(z, weight, bias, act, scale=scale, shift=shift)[0]


def _rows(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as a matrix of positions and channels, (B*H*W, C)."""
    return _last(x).permute(0, 2, 3, 1).flatten(0, 2)


def pointwise_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the 1x1 convolution with respect to its input, (B, C, H, W) in channels_last.

    grad is (B, O, H, W), weight (O, C) of its type.
    """
    batch, _, height, width = grad.shape
    # PyTorch's convolution multiplies by cuBLAS, too, but returns another layout.
    return (_rows(grad) @ weight).view(batch, height, width, weight.shape[1]).permute(0, 3, 1, 2)


def pointwise_weight_grad(grad: Tensor, z: Tensor) -> Tensor:
    """Return the gradient of the 1x1 convolution with respect to its weight, (O, C) of the type of grad and z.

    grad is (B, O, H, W), and z, the input, (B, C, H, W).
    """
    return _rows(grad).t() @ _rows(z)


# ---- vectors --------------------------------------------------------------------------------------------------------


@_operator(
    "(Tensor weight, Tensor bias, Tensor features, str act) -> Tensor",
    lambda weight, bias, features, act: _floats(features, weight.shape[0]),
)
def expected_mean(weight: Tensor, bias: Tensor, features: Tensor, act: str) -> Tensor:
    """Compute about the mean of `act(convolution(x))`, (O,) in float32, as `reference.expected_mean` does."""
    outputs, grouped = len(weight), weight.shape[1] == 1
    flat = weight.detach().flatten(1).contiguous()
    taken = _vector("features", features, outputs if grouped else flat.shape[1], features)
    mean = _floats(features, outputs)
    _launch(
        kernels.expected_mean,
        (-(-outputs // 8),),
        *(flat, bias.detach().contiguous(), taken, mean, *flat.shape),
        ACT=act,
        GROUPED=grouped,
        OUTPUTS=8,
        INPUTS=128,
        warps=4,
    )
    return mean


def _launch_on_vectors(
    kernel: Any, outputs: int, first: Tensor, *others: Tensor | None, count: float, eps: float
) -> Tensor:
    """Launch `affine` or `affine_grad` on vectors (C,), in the kernel's order; return its (outputs, C) in float32."""
    channels = len(first)
    given = [_vector("a vector", vector, channels, first) for vector in (first, *others)]
    out = _floats(first, outputs, channels)
    _launch(kernel, (-(-channels // 128),), *given, out, channels, count, eps, CHANNELS=128, warps=1)
    return out


@_operator(
    "(Tensor s, Tensor q, Tensor center, Tensor? weight, Tensor? bias, float count, float eps) -> Tensor",
    lambda s, q, center, weight, bias, count, eps: _floats(s, 4, len(s)),
)
def _affine(
    s: Tensor, q: Tensor, center: Tensor, weight: Tensor | None, bias: Tensor | None, count: float, eps: float
) -> Tensor:
    return _launch_on_vectors(kernels.affine, 4, s, q, center, weight, bias, count=count, eps=eps)


def affine(
    s: Tensor, q: Tensor, center: Tensor, weight: Tensor | None, bias: Tensor | None, count: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scale and shift of BatchNorm, and mean and variance, (C,) each, as `reference.affine` does."""
    scale, shift, mean, var = _affine(s, q, center, weight, bias, count, eps).unbind()
    return scale, shift, mean, var


@_operator(
    "(Tensor grad_scale, Tensor grad_shift, Tensor s, Tensor q, Tensor center, Tensor? weight, float count, float eps)"
    " -> Tensor",
    lambda grad_scale, grad_shift, s, q, center, weight, count, eps: _floats(s, 3, len(s)),
)
def _affine_grad(
    grad_scale: Tensor,
    grad_shift: Tensor,
    s: Tensor,
    q: Tensor,
    center: Tensor,
    weight: Tensor | None,
    count: float,
    eps: float,
) -> Tensor:
    vectors = grad_scale, grad_shift, s, q, center, weight
    return _launch_on_vectors(kernels.affine_grad, 3, *vectors, count=count, eps=eps)


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
    """Return the gradients of `affine` with respect to s, q and weight, (C,) each, as `reference.affine_grad` does."""
    grad_s, grad_q, grad_weight = _affine_grad(grad_scale, grad_shift, s, q, center, weight, count, eps).unbind()
    return grad_s, grad_q, grad_weight
