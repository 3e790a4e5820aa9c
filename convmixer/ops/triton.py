"""The operations of a ConvMixer block on CUDA devices, in Triton; `convmixer.ops.reference` has them for any tensor.

Activations are (B, C, H, W) and lie in memory as (B, H, W, C), channels_last; other layouts are accepted and copied
first. They are bfloat16, float16 or float32, all sums are float32. No kernel uses atomics: each program writes its own
partial sums and a second pass adds them, so results do not change from run to run on one GPU.

The depthwise convolution exists in two forms, and a row of `DEPTHWISE` says which one runs:

direct   On the CUDA cores. A thread holds `columns` neighbouring outputs of two channels in registers. An input value
         is loaded and converted once per kernel row and used for up to k outputs. Channels lie side by side in memory,
         so each load of a warp is one line of 128 bytes.
banded   On the tensor cores. For one channel, a row of outputs is `Y[h] = sum_i X[h+i] T_i`, where T_i is the banded
         matrix (inputs x outputs) of kernel row i. A program holds T_0 ... T_{k-1} and streams rows past them, of 16
         images or strips of images at a time, which are the rows of the product: every input row is loaded once and
         multiplied by all T_i, into k rolling rows of outputs. 16 inputs make 8 outputs where k is at most 9, so
         16/k times as many products are computed as needed; 32 make 8 above. What the layout costs: the inputs of one
         channel lie C elements apart, so blocks of 16 channels are loaded together (32 bytes in a line) and go through
         shared memory to reach the tensor cores channel by channel; and neighbouring tiles share inputs, which are
         read twice.

The weight gradient has both forms, too, by `WEIGHT_GRADIENT`. In the banded one the products are those of a row of
inputs with a row of gradients, over 16 images or strips; diagonals of their sum are the gradient of a kernel row.

No row of the tables was measured: they come from what the compiler says (`benchmarks/kernels_static.py`). `tune`
measures candidates on the GPU at hand.

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
except ImportError as error:
    raise DependencyError("the fused kernels need triton, which is missing: pip install triton") from error

from convmixer.ops import kernels
from convmixer.ops.dispatch import DTYPES, KERNEL_SIZES

INTERPRETED = not isinstance(kernels.normalize, triton.JITFunction)  # TRITON_INTERPRET=1 at the first import
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
    """A program's tile: 16 images or strips of `rows` rows, of `channels` channels; 8 columns."""

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


class BandedGradient(NamedTuple):
    """The same on the tensor cores: sums over tiles of 16 images or strips of `rows` rows, and 8 columns."""

    kernel_rows: int
    rows: int
    channels: int
    warps: int


class Product(NamedTuple):
    """A program's tile of the 1x1 convolution: `rows` positions x `outputs`, in steps of `inputs` channels.

    `apart`: `scale1*act(c) + shift1 + x` is formed by a pass of its own before, and not by each program.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    apart: bool = False


# By compute capability (the nearest below counts), kernel size and bytes of an element. Unmeasured.
# 8.6, 8.9 and 12.0 have 99 KiB of shared memory for a program, and matrices of 10 and 11 rows take 104.
DEPTHWISE: dict[tuple[int, int, int], Direct | Banded] = {
    (capability, size, 4): Direct(16, 4, 1, 32, 4) for capability in (80, 86, 90, 120) for size in KERNEL_SIZES
}
DEPTHWISE |= {
    (capability, size, 2): Banded(32, 16, 8) if size < 10 or capability in (80, 90) else Direct(8, 4, 1, 64, 4)
    for capability in (80, 86, 90, 120)
    for size in KERNEL_SIZES
}
WEIGHT_GRADIENT: dict[tuple[int, int, int], Gradient | BandedGradient] = {
    **{
        (capability, size, 2): BandedGradient(size if size < 10 else 6, 8 if size < 8 else 4, 16, 8)
        for capability in (80, 90)
        for size in KERNEL_SIZES
    },
    **{(capability, size, 4): Gradient(2, 16, 4, 32, 4) for capability in (80, 90) for size in KERNEL_SIZES},
}
# By compute capability, what z is, and bytes of an element. z is given (0), or made of c and x (1), by GELU for more
# than 256 outputs (2). Where programs would make it often, or slowly, a pass before does. Unmeasured.
POINTWISE: dict[tuple[int, int, int], Product] = {
    # 12.0 has the shared memory of 8.6, and 10.0 another product with an accumulator of its own.
    **{(capability, z, 2): Product(128, 128, 32, 8, 3, z > 0) for capability in (80, 120) for z in range(3)},
    **{(capability, z, 4): Product(64, 64, 32, 4, 2, z == 2) for capability in (80, 120) for z in range(3)},
    (90, 0, 2): Product(128, 256, 64, 8, 3),
    (90, 1, 2): Product(64, 256, 64, 4, 2),
    (90, 2, 2): Product(128, 256, 64, 8, 3, apart=True),
    (100, 0, 2): Product(128, 128, 64, 8, 3),
    (100, 1, 2): Product(128, 128, 64, 8, 2),
    (100, 2, 2): Product(128, 128, 64, 8, 3, apart=True),
    **{(capability, z, 4): Product(64, 128, 32, 8, 2, z == 2) for capability in (90, 100) for z in range(3)},
}
# What `tune` tries beside the row of the table.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "depthwise": (
        *(Direct(columns, down, 1, 64, 4) for columns in (16, 8) for down in (4, 8)),
        *(Banded(rows, 16, warps) for rows in (32, 16) for warps in (8, 16)),
        Banded(32, 32, 16),
    ),
    "weight_gradient": (
        *(Gradient(rows, columns, 4, 64, 4) for rows in (2, 1, 3) for columns in (16, 8)),
        Gradient(2, 8, 8, 64, 8),
        *(BandedGradient(kernel_rows, rows, 16, 8) for kernel_rows in (3, 5, 11) for rows in (4, 8)),
    ),
    "pointwise": (
        *(Product(128, outputs, 64, 8, stages) for outputs in (128, 256) for stages in (2, 3)),
        *(Product(128, outputs, 64, 8, 3, apart=True) for outputs in (128, 256)),
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
        raise ArgumentError(f"compute capability {major}.{minor}: the Triton kernels need a GPU of at least 8.0")
    place = (max(below), *key, tensor.element_size())
    return table[place]


def forms(x: Tensor, kernel_size: int) -> list[Direct | Banded]:
    """The table's form of the depthwise convolution for x, then the other one where there is one for x's type."""
    chosen: Direct | Banded = _row(DEPTHWISE, x, kernel_size)
    others = [config for config in CANDIDATES["depthwise"] if type(config) is not type(chosen)]
    return [chosen, *others[: 1 if x.element_size() == 2 else 0]]


def gradients(x: Tensor, kernel_size: int) -> list[Gradient | BandedGradient]:
    """As `forms`, of the weight gradient."""
    chosen: Gradient | BandedGradient = _row(WEIGHT_GRADIENT, x, kernel_size)
    others = [config for config in CANDIDATES["weight_gradient"] if type(config) is not type(chosen)]
    return [chosen, *others[: 1 if x.element_size() == 2 else 0]]


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
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: "
                f"{tuple(first.shape)} on {first.device} is needed"
            )


def _vector(name: str, vector: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """A vector of one float32 per channel, checked."""
    if vector is None:
        return None
    if vector.shape != (length,) or vector.device != x.device:
        given = f"{name} of shape {tuple(vector.shape)} on {vector.device}"
        raise ArgumentError(f"{given}: ({length},) on {x.device} is needed")
    return vector.detach().float().contiguous()


def _kernel(weight: Tensor, x: Tensor) -> Tensor:
    """A depthwise kernel (C, 1, k, k), checked, as (k, k, 1, C): channels side by side as in the activations."""
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
        raise ArgumentError(f"kernel_size={kernel_size}: the Triton kernels take 3 to 11")


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
        kernels.depthwise_direct if isinstance(config, Direct) else kernels.depthwise_banded,
        (programs, -(-channels // config.channels)),
        *(_last(x), taps, *vectors, None if residual is None else _last(residual), y, sums, height, width, *places),
        warps=config.warps,
        **constants,
    )
    return y, x.new_empty(0) if sums is None else sums


def _strips(batch: int, height: int, size: int, rows: int) -> tuple[int, int, int, int]:
    """Strips of an image and their rows, at least 16 strips in all where there are so many rows; inputs, outputs."""
    strips = max(-(-height // rows), min(height, -(-16 // max(batch, 1))))
    return strips, -(-height // strips), 16 if size < 10 else 32, 8


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
    vectors = [_vector(name, vector, channels, u) for name, vector in {"scale": scale, "shift": shift}.items()]
    grid, constants = _elementwise(rows, channels)
    unused = None, None, None, None
    _launch(kernels.normalize, grid, _last(u), *vectors, *unused, out, None, rows, ACT=act, ACT_X=act, **constants)
    return out


@_operator(
    "(Tensor c, Tensor scale, Tensor shift, str act, Tensor u, Tensor scale_u, Tensor shift_u, str act_u) -> Tensor",
    lambda c, scale, shift, act, u, scale_u, shift_u, act_u: _empty(c),
)
def sum_normalized(
    c: Tensor, scale: Tensor, shift: Tensor, act: str, u: Tensor, scale_u: Tensor, shift_u: Tensor, act_u: str
) -> Tensor:
    """`scale*act(c) + shift + scale_u*act_u(u) + shift_u`, (B, C, H, W) of c's type."""
    return _sum_normalized(c, scale, shift, act, u, scale_u, shift_u, act_u)


def _sum_normalized(
    c: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: str,
    x: Tensor,
    scale_x: Tensor | None = None,
    shift_x: Tensor | None = None,
    act_x: str = "identity",
) -> Tensor:
    """`sum_normalized`; without `scale_x`, x is added as it is."""
    _require(c, act, x=x)
    _require(x, act_x)
    batch, channels, height, width = c.shape
    rows, out = batch * height * width, _empty(c)
    named = {"scale": scale, "shift": shift, "scale_x": scale_x, "shift_x": shift_x}
    gain, offset, *after = (_vector(name, vector, channels, c) for name, vector in named.items())
    grid, constants = _elementwise(rows, channels)
    tensors = (_last(c), gain, offset, None, _last(x), *after, out, None)
    _launch(kernels.normalize, grid, *tensors, rows, ACT=act, ACT_X=act_x, **constants)
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
    gain = _vector("scale", scale, channels, u)
    tensors = (_last(u), gain, None, _last(grad), None, None, None, out, sums)
    _launch(kernels.normalize, grid, *tensors, rows, ACT=act, ACT_X=act, **constants)
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
    _launch(kernels.stats_gradient, grid, _last(grad_u), _last(u), *vectors, out, rows, ACT=act, **constants)
    return out


def _elementwise(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    grid = -(-rows // ROWS), -(-channels // CHANNELS)
    return grid, {"C": channels, "ROWS": ROWS, "CHANNELS": CHANNELS, "warps": 4}


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, str act, Tensor center) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias, act, center: (_empty(x), _floats(x, x.shape[1]), _floats(x, x.shape[1])),
)
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, center: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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


@_operator(
    "(Tensor grad, Tensor weight, Tensor? residual=None) -> Tensor",
    lambda grad, weight, residual=None: _empty(grad),
)
def depthwise_input_grad(grad: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Gradient of the depthwise convolution with respect to its input, of grad's type, plus `residual`."""
    return _convolve(grad, weight, None, "identity", residual=residual, transpose=True)[0]


def _fake_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return _floats(x, channels, 1, kernel_size, kernel_size), _floats(x, channels)


@_operator("(Tensor x, Tensor grad, int kernel_size) -> (Tensor, Tensor)", _fake_weight_grad)
def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise convolution with respect to weight (C, 1, k, k) and bias (C,), in float32."""
    return _correlate(x, grad, kernel_size)


def _correlate(
    x: Tensor, grad: Tensor, size: int, config: Gradient | BandedGradient | None = None
) -> tuple[Tensor, Tensor]:
    _require(x, grad=grad)
    _size(size)
    batch, channels, height, width = x.shape
    config = config or _row(WEIGHT_GRADIENT, x, size)
    constants: dict[str, Any] = {"C": channels, "K": size, "BEFORE": (size - 1) // 2}
    constants |= {"KERNEL_ROWS": min(config.kernel_rows, size), "CHANNELS": config.channels}
    blocks, parts = -(-channels // config.channels), -(-size // constants["KERNEL_ROWS"])
    places: tuple[int, ...]
    if isinstance(config, Gradient):
        tiles_h, tiles_w = -(-height // config.groups), -(-width // config.columns)
        tiles, places, most = batch * tiles_h * tiles_w, (tiles_h, tiles_w), PROGRAMS
        constants |= {"COLUMNS": config.columns, "GROUPS": config.groups}
    else:
        strips, tiles_w = -(-height // config.rows), -(-width // 8)
        # A program takes four times the registers of the other form's, and has more to do at its end.
        tiles, places, most = -(-batch * strips // 16) * tiles_w, (strips, batch * strips, tiles_w), PROGRAMS // 4
        constants |= {"ROWS": config.rows, "INPUTS": 16 if size < 10 else 32, "OUTPUTS": 8}
    programs = min(tiles, -(-most // (blocks * parts)))
    sums = _floats(x, programs, size * size + 1, channels)
    _launch(
        kernels.depthwise_weight_gradient if isinstance(config, Gradient) else kernels.depthwise_weight_gradient_banded,
        (programs, blocks, parts),
        *(_last(x), _last(grad), sums, height, width, *places, tiles),
        warps=config.warps,
        **constants,
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
    config = config or _row(POINTWISE, c, 0 if x is None else 1 + (act == "gelu" and outputs > 256))
    if config.apart and scale1 is not None and shift1 is not None and x is not None:
        c, before, x = _sum_normalized(c, scale1, shift1, act, x), [None, None], None
    u, rows = _empty(c, outputs), batch * height * width
    tiles = -(-rows // config.rows)
    sums = None if center is None else _floats(c, 2, tiles, outputs)
    _launch(
        kernels.pointwise,
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


# ---- tuning ---------------------------------------------------------------------------------------------------------


def tune(
    shape: tuple[int, int, int, int], kernel_size: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, list[tuple[Any, float]]]:
    """Measure `CANDIDATES` and the tables' rows on the current GPU: what a person who edits the tables runs.

    Args:
        shape: Of the activations, (B, C, H, W).
        kernel_size: Of the depthwise convolution.
        dtype: Of activations and weights.

    Returns:
        For each operation its configurations and their milliseconds, the fastest first; a configuration that the GPU
        has no room for is left out.
    """
    from triton.testing import do_bench

    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    vector = torch.rand(channels, device="cuda")
    weight = torch.randn(channels, 1, kernel_size, kernel_size, device="cuda", dtype=dtype) / kernel_size
    square = torch.randn(channels, channels, device="cuda", dtype=dtype) / channels**0.5
    calls: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "depthwise": (
            _row(DEPTHWISE, x, kernel_size),
            lambda config: _convolve(x, weight, vector, "gelu", center=vector, config=config),
        ),
        "weight_gradient": (
            _row(WEIGHT_GRADIENT, x, kernel_size),
            lambda config: _correlate(x, x, kernel_size, config),
        ),
        "pointwise": (
            _row(POINTWISE, x, 1 + (channels > 256)),
            lambda config: _multiply(x, square, vector, "gelu", (vector, vector, x), vector, config=config),
        ),
    }
    found: dict[str, list[tuple[Any, float]]] = {}
    for name, (row, call) in calls.items():
        times = []
        for config in dict.fromkeys((row, *CANDIDATES[name])):
            if dtype == torch.float32 and isinstance(config, Banded | BandedGradient):
                continue  # float32 has no form by products
            try:
                times.append((config, float(do_bench(functools.partial(call, config)))))
            except triton.runtime.errors.OutOfResources:
                continue
        found[name] = sorted(times, key=lambda pair: pair[1])
    return found
