"""A folded model in int8: its ranges by calibration images, and the integers and tables that `csrc/cpu_bytes.h` reads.

A block computes, per channel,

    c = depthwise(x)    z = x + gain*act(c)    u = pointwise(z)    x' = a*act(u) + b

where a and b are what folding leaves of the BatchNorm after it. Weights are int8 with a scale t for each output,
w = t*q; x and z are unsigned bytes.

Scale and zero point. x and z are bytes of one scale s and one zero point Z, a whole number:

    x = s*(byte - Z)

Calibration says which values [low, high] x and z take; `MARGIN` widens the range, which also includes 0. So Z is a byte
itself and stands for exactly 0, which the depthwise convolution reads beyond the border. Above the range there is room
for a lift, see below. One end of the range is byte 0, which gives Z:

    |s| = (high - low + lift)/255        Z = -low/s where s > 0, high/|s| where s < 0

Sums. Both convolutions are sums of integers:

    c = s*t*sum(q*byte) + bias - s*t*Z*sum(q)        u = t*sum(q*byte) + bias - t*sum(q*Z)

In the pointwise one each input has its own s, which is multiplied into the weights before they are quantized.

Tables. Calibration says which values [low, low + 255*step] the input of an activation takes; low is at least `_floor`,
below which the activation is 0 anyway. A sum becomes a signed byte, the index

    (value - low)/step - 128

by one multiply-add with saturation, and a table of 256 bytes per channel says what becomes of it: for c the residual
gain*act(c)/s plus the lift, for u the next block's byte (a*act(u) + b)/s' + Z'.

Lift. Residuals have both signs, and the bytes of a table do not. So the first table holds the residual plus a lift,
which is the size of the most negative residual, and the kernel computes byte + table[index] - lift, each step with
saturation. Before the subtraction, values are higher by the lift: that is what the room is for. To keep it small, s is
negative in a channel where more is subtracted than added. That swaps the signs, and the lift is then the largest
positive residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from convmixer.native.packing import AffineRecord, BlockRecord, Native, scale_and_shift

if TYPE_CHECKING:
    from convmixer.runtime.folding import FoldedConvMixer

MARGIN = 1.15  # factor from the range of calibration images to that of bytes: saturation costs more than coarse steps
_GELU_FLOOR = -4.5  # GELU of anything below is within 2e-5 of 0


class Span(NamedTuple):
    """Lowest and highest value of each channel, (dim,) each."""

    low: Tensor
    high: Tensor


class Quantization(NamedTuple):
    """What bytes stand for, `scale * (byte - zero_point)`, (dim,) each in float32; a scale may be negative."""

    scale: Tensor
    zero_point: Tensor


@dataclass
class Ranges:
    """The ranges of a model's values for calibration images, as the description of this module names them.

    Attributes:
        x: The span of x and z together in each block; last, that of the last block's outputs.
        depthwise: The span of c in each block.
        pointwise: The span of u in each block.
    """

    x: list[Span]
    depthwise: list[Span]
    pointwise: list[Span]


@torch.inference_mode()
def calibrate(folded: FoldedConvMixer, images: Tensor) -> Ranges:
    """Measure the ranges of a model folded with `divide=False`, for images (N, C, H, W) as it takes them."""
    depth = len(folded.blocks)
    # For each block, the spans of all batches.
    features: list[list[Span]] = [[] for _ in range(depth + 1)]
    depthwise: list[list[Span]] = [[] for _ in range(depth)]
    pointwise: list[list[Span]] = [[] for _ in range(depth)]
    for batch in images.float().split(64):
        x = folded.stem(batch)
        for i, block in enumerate(folded.blocks):
            layers: Any = block
            x = layers.norm(x)
            c = layers.depthwise(x)
            z = torch.addcmul(x, layers.gain, layers.act(c))
            u = layers.pointwise(z)
            features[i].append(_span(x, z))
            depthwise[i].append(_span(c))
            pointwise[i].append(_span(u))
            x = layers.last_act(u)
        features[depth].append(_span(x))
    return Ranges(*([_union(spans) for spans in found] for found in (features, depthwise, pointwise)))


def _span(*values: Tensor) -> Span:
    """Return the span of feature maps (B, dim, H, W) together."""
    return _union([Span(v.amin((0, 2, 3)), v.amax((0, 2, 3))) for v in values])


def _union(spans: list[Span]) -> Span:
    """Return the smallest span that holds all of these."""
    low, high = zip(*spans, strict=True)
    return Span(torch.stack(low).amin(0), torch.stack(high).amax(0))


class NativeInt8(Native):
    """A folded model in int8: convolutions, and activations by tables. The patch embedding is in bfloat16.

    Args:
        folded: With `divide=False`, in float32 on the CPU.
        ranges: From `calibrate`.
        threads: Number of threads.

    Raises:
        DependencyError: As `Native`.
    """

    def __init__(self, folded: FoldedConvMixer, ranges: Ranges, threads: int) -> None:
        self.ranges = ranges
        self._floor = 0.0 if isinstance(folded.stem[1], nn.ReLU) else _GELU_FLOOR
        # Of x in each block, and of the last block's outputs.
        self._quantizations = [
            self._quantization(span, depthwise, block)
            for span, depthwise, block in zip(ranges.x, ranges.depthwise, folded.blocks, strict=False)
        ]
        self._quantizations.append(_fit(ranges.x[-1], torch.tensor(False), torch.tensor(0.0)))
        super().__init__(folded, torch.int8, threads)
        norm: Any = folded.blocks[0].norm
        stem: Any = folded.stem[0]
        (a, b), (scale, zero_point) = scale_and_shift(norm, stem.bias), self._quantizations[0]
        values = (stem.bias, a / scale, b / scale + zero_point)
        self._record.stem_end = AffineRecord(*(self._address(value) for value in values))
        self._record.last = self._address(self._quantizations[-1].scale)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folded, self.ranges, self._thread_count.most)

    def _quantization(self, span: Span, depthwise: Span, block: Any) -> Quantization:
        """Choose the bytes of x and z in a block, with the sign of the scale that needs less room for the lift."""
        residual = self._residual(block, self._table_inputs(depthwise).values)
        subtracted, added = -residual.amin(1), residual.amax(1)
        lift = torch.minimum(subtracted, added).clamp_min(0)
        return _fit(span, added < subtracted, lift)

    def _fill_block(self, record: BlockRecord, block: Any, next_norm: Any, index: int) -> None:
        self._fill_depthwise(record, block, index)
        self._fill_pointwise(record, block, next_norm, index)

    def _fill_depthwise(self, record: BlockRecord, block: Any, index: int) -> None:
        """Fill in what makes z of x: the kernels, the index of c, the table of residuals, and the lift."""
        scale, zero_point = self._quantizations[index]
        record.zeros = self._address(zero_point.to(torch.uint8))
        weight, weight_scale = _quantize_weight(block.depthwise.weight[:, 0])
        record.kernel = self._address(_shifted_rows(weight))
        bias = block.depthwise.bias - scale * weight_scale * zero_point * weight.sum((1, 2))
        inputs = self._table_inputs(self.ranges.depthwise[index])
        record.gain, record.bias = self._index_addresses(scale * weight_scale, bias, inputs)
        residual = self._residual(block, inputs.values) / scale[:, None]
        lift = (-residual.amin(1)).clamp(0, 255).ceil()
        record.lifts = self._address(lift.to(torch.uint8))
        record.tables[0] = self._table_address(residual + lift[:, None])

    def _fill_pointwise(self, record: BlockRecord, block: Any, next_norm: Any, index: int) -> None:
        """Fill in what makes the next block's x of z: the weights, the index of u, and the table of bytes."""
        (scale, zero_point), following = self._quantizations[index], self._quantizations[index + 1]
        weight, weight_scale = _quantize_weight(block.pointwise.weight[:, :, 0, 0] * scale)
        record.pointwise = self._address(rearrange(weight, "(o row) (i column) -> o i row column", row=16, column=64))
        bias = block.pointwise.bias - weight_scale * (weight * zero_point).sum(1)
        inputs = self._table_inputs(self.ranges.pointwise[index])
        record.end.scale, record.end.bias = self._index_addresses(weight_scale, bias, inputs)
        a, b = (value[:, None] for value in scale_and_shift(next_norm, block.pointwise.bias))
        outputs = a * block.last_act(inputs.values) + b
        record.tables[1] = self._table_address(outputs / following.scale[:, None] + following.zero_point[:, None])

    def _dequantize(self, out: Tensor) -> Tensor:
        """Subtract the zero point; the kernel has multiplied by the scale."""
        scale, zero_point = self._quantizations[-1]
        return out - (scale * zero_point).reshape(-1, *[1] * (out.dim() - 2))

    @staticmethod
    def _residual(block: Any, values: Tensor) -> Tensor:
        """Return what a block adds to x, for outputs (dim, 256) of its depthwise convolution."""
        added: Tensor = block.gain.flatten()[:, None] * block.act(values)
        return added

    def _table_inputs(self, span: Span) -> _TableInputs:
        """Spread the 256 inputs of a table evenly over a span, from `_floor` on."""
        low = span.low.clamp_min(self._floor)
        step = (span.high - low).clamp_min(1e-6) / 255
        return _TableInputs(low[:, None] + step[:, None] * torch.arange(256), low, step)

    def _index_addresses(self, unit: Tensor, bias: Tensor, inputs: _TableInputs) -> tuple[int, int]:
        """Return the addresses of factor and offset, (dim,) each, that turn an integer sum into a table's index.

        The value that the sum stands for is unit*sum + bias.
        """
        return self._address(unit / inputs.step), self._address((bias - inputs.low) / inputs.step - 128)

    def _table_address(self, values: Tensor) -> int:
        """Return the address of a table of values (dim, 256), as bytes by the index 0 ... 127, -128 ... -1."""
        return self._address(values.round().clamp(0, 255).to(torch.uint8).roll(-128, 1))


class _TableInputs(NamedTuple):
    """The inputs for which a table holds outputs, (dim, 256); the lowest and the step to the next, (dim,) each."""

    values: Tensor
    low: Tensor
    step: Tensor


def _fit(span: Span, negative: Tensor, lift: Tensor) -> Quantization:
    """Return the scale and zero point of bytes that hold a span, widened by `MARGIN`, and above it a lift.

    Args:
        span: Of the values.
        negative: Where the scale is negative, (dim,) or ().
        lift: In units of the values, (dim,) or ().
    """
    low, high = (MARGIN * value for value in (span.low.clamp(max=0), span.high.clamp(min=0)))
    scale = (high - low + lift).clamp_min(1e-6) / 255
    zero_point = (torch.where(negative, high, -low) / scale).round().clamp(0, 255)
    return Quantization(torch.where(negative, -scale, scale), zero_point)


def _quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights (outputs, ...) as int8 values of the same shape, and their scale, (outputs,)."""
    scale = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
    return (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), scale


def _shifted_rows(weight: Tensor) -> Tensor:
    """Pack int8 depthwise kernels (dim, k, k) as (dim, k, 16, 4).

    Group i of a row holds the values i, i - 1, i - 2 and i - 3 of the reversed row, zeros beyond its ends.
    """
    k = weight.shape[2]
    row = nn.functional.pad(weight.flip(2), (3, 16 - k))
    return torch.stack([row[..., 3 - j : 19 - j] for j in range(4)], -1)
