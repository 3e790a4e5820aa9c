"""Random changes of training images, computed for a chunk of images at once, on the device that holds them.

Draws are separate from computation. The CPU makes all draws. Those of an image follow from the seed, the epoch and
the position of the image in the order of the epoch: chunks, processes, parts of a step and devices change nothing.
Since the CPU knows the draws, it sorts the images by operation without waiting for the device.

Images stay uint8 between operations. Each operation returns what torchvision's returns for one image: the same for
posterize, solarize, autocontrast, equalize, the geometric ones, flips and shifts; for the others within one grey level.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from convmixer.data.memory import Batch, ImageSet, Share
from convmixer.errors import ArgumentError
from convmixer.training.recipe import Recipe
from convmixer.training.schedule import image_size

LEVELS = 31  # of the magnitude of RandAugment and TrivialAugment
NOISE = 2**20  # random numbers of an epoch from which each erased rectangle takes a stretch
PIXELS = {"cuda": 2**23}  # of the images of a chunk: enough that launches cost little
PIXELS_ELSEWHERE = 2**21  # few enough that an operation's images stay in the cache of a CPU

Array = npt.NDArray[Any]


class Op(IntEnum):
    """The operations of RandAugment and TrivialAugmentWide, and the last one of the colour jitter."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13
    HUE = 14


# ---- draws, on the CPU ----------------------------------------------------------------------------------------------


class RandomNumbers:
    """Random numbers for the N images of some parts of an epoch; each image has its own.

    Args:
        share: What this process takes of the epoch.
        positions: (step, part of the step) of each of the parts.
    """

    def __init__(self, share: Share, positions: Sequence[tuple[int, int]]) -> None:
        each = share.batch_size // share.parts
        self.count = share.batch_size
        # Each part takes its own from the numbers of the whole step: they are the same however processes share it.
        self.parts = [
            (np.random.default_rng((share.seed, share.epoch, step, 0)), slice(part * each, (part + 1) * each))
            for step, part in positions
        ]

    def uniform(self, rows: int) -> Array:
        """Return (rows, N) in [0, 1)."""
        return np.concatenate([rng.random((rows, self.count))[:, own] for rng, own in self.parts], axis=1)

    def beta(self, alpha: float) -> Array:
        """Return (N,) of the distribution Beta(alpha, alpha)."""
        return np.concatenate([rng.beta(alpha, alpha, self.count)[own] for rng, own in self.parts])


def _linspace(start: float, end: float) -> Array:
    """Return a value for each level, in torchvision's float32, which decides thresholds."""
    return torch.linspace(start, end, LEVELS, dtype=torch.float32, device="cpu").numpy()


@functools.lru_cache
def magnitudes(wide: bool, height: int, width: int) -> Array:
    """Return the value of each operation of RandAugment at each level (14, 31), or with `wide` of TrivialAugmentWide.

    Shears are tangents, translations pixels, rotations degrees; brightness, colour, contrast and sharpness are what is
    added to a factor of 1; posterize has the bits that stay, solarize the threshold in [0, 1].
    """
    shear, turn, factor, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    across, down = (32.0, 32.0) if wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    table = np.zeros((14, LEVELS))
    most = {Op.SHEAR_X: shear, Op.SHEAR_Y: shear, Op.TRANSLATE_X: across, Op.TRANSLATE_Y: down, Op.ROTATE: turn}
    most |= dict.fromkeys((Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS), factor)
    for op, end in most.items():
        table[op] = _linspace(0.0, end)
    table[Op.POSTERIZE] = np.rint(8 - np.arange(LEVELS) * bits / (LEVELS - 1))
    table[Op.SOLARIZE] = _linspace(1.0, 0.0)
    return table


class Operations(NamedTuple):
    """One operation for each image: `op` (N,), and what it takes (N,), as factors for the blending ones."""

    op: Array
    value: Array


def draw_operations(numbers: RandomNumbers, level: int | None, height: int, width: int) -> Operations:
    """Draw an operation of RandAugment for each image at a level, or one of TrivialAugmentWide at its own level."""
    random = numbers.uniform(3)
    op = (random[0] * 14).astype(np.int64)
    levels = (random[1] * LEVELS).astype(np.int64) if level is None else level
    value = magnitudes(level is None, height, width)[op, levels]
    signed = (op >= Op.SHEAR_X) & (op <= Op.SHARPNESS)
    value = np.where(signed & (random[2] < 0.5), -value, value)
    value = np.where((op == Op.TRANSLATE_X) | (op == Op.TRANSLATE_Y), np.trunc(value), value)
    return Operations(op, value + ((op >= Op.BRIGHTNESS) & (op <= Op.SHARPNESS)))


def draw_jitter(numbers: RandomNumbers, strength: float) -> list[Operations]:
    """Draw brightness, contrast, saturation and hue in random order, each with its own factor."""
    random = numbers.uniform(8)
    order = random[:4].argsort(axis=0)
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * random[4:]
    factors[3] = min(strength, 0.5) * (2 * random[7] - 1)
    ops = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.HUE])
    return [Operations(ops[chosen], np.take_along_axis(factors, chosen[None], 0)[0]) for chosen in order]


def _draw_boxes(
    random: Array, area: tuple[float, float], ratio: float, shape: tuple[int, int], most: tuple[int, int]
) -> tuple[Array, Array]:
    """Return boxes (4, N) as top, left, height and width, at random in an image of `shape`, from `random` (22, N).

    Their part of the area is uniform in `area`, the logarithm of their aspect ratio between those of 1 / ratio and
    ratio. Ten are drawn, and the first not larger than `most` is taken; the second result says where there is one.
    """
    areas = (area[0] + (area[1] - area[0]) * random[:10]) * math.prod(shape)
    ratios = ratio ** (2 * random[10:20] - 1)
    heights, widths = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (heights >= 1) & (heights <= most[0]) & (widths >= 1) & (widths <= most[1])
    first = fits.argmax(axis=0)[None]
    height, width = (np.take_along_axis(sides, first, 0)[0] for sides in (heights, widths))
    top, left = np.floor(random[20] * (shape[0] - height + 1)), np.floor(random[21] * (shape[1] - width + 1))
    return np.stack([top, left, height, width]).astype(np.int64), np.asarray(fits.any(axis=0))


def draw_crops(numbers: RandomNumbers, least: float, height: int, width: int) -> Array:
    """Draw boxes (4, N) of at least a part of the area; where ten draws do not fit, the largest central box."""
    boxes, found = _draw_boxes(numbers.uniform(22), (least, 1.0), 4 / 3, (height, width), (height, width))
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    central = np.array([(height - h) // 2, (width - w) // 2, h, w])
    return np.where(found, boxes, central[:, None])


class Erasing(NamedTuple):
    """`image` (K,) has the indices of the images, `box` (4, K) the rectangles, `start` (K,) positions in the noise."""

    image: Array
    box: Array
    start: Array


def draw_erasing(numbers: RandomNumbers, probability: float, height: int, width: int) -> Erasing:
    """Draw what timm's RandomErasing does: 2 to 33 % of the area, an aspect ratio of 0.3 to 3.3."""
    random = numbers.uniform(24)
    image = np.flatnonzero(random[0] < probability)
    random = random[1:, image]
    box, found = _draw_boxes(random[1:], (0.02, 1 / 3), 1 / 0.3, (height, width), (height - 1, width - 1))
    return Erasing(image[found], box[:, found], (random[0] * NOISE).astype(np.int64)[found])


class Mixing(NamedTuple):
    """`weight` (N,) is each image's own; of `cut` (N,) `box` (4, N) comes from the partner, others are blended."""

    weight: Array
    cut: Array
    box: Array


def draw_mixing(numbers: RandomNumbers, recipe: Recipe, height: int, width: int) -> Mixing:
    """Draw mixup or cutmix for each image with probability `mix_prob`; both are as likely if the recipe has both."""
    random = numbers.uniform(4)
    cut = random[1] < bool(recipe.cutmix) / (bool(recipe.cutmix) + bool(recipe.mixup))
    weights = [numbers.beta(alpha) if alpha else 1.0 for alpha in (recipe.cutmix, recipe.mixup)]
    weight = np.where(cut, *weights)
    mixed = random[0] < recipe.mix_prob
    edges = []
    for side, position in ((height, random[2]), (width, random[3])):
        length = np.rint(np.sqrt(1 - weight) * side)
        first = np.floor(np.floor(position * side) - length / 2)
        edges.append((np.clip(first, 0, side), np.clip(first + length, 0, side)))
    (top, bottom), (left, right) = edges
    box = np.stack([top, left, bottom - top, right - left]).astype(np.int64)
    weight = np.where(cut, 1 - box[2] * box[3] / (height * width), weight)
    return Mixing(np.where(mixed, weight, 1.0), mixed & cut, box)


@dataclass(frozen=True)
class Draws:
    """The draws for each of the N images of a chunk; what a recipe leaves out is empty or None.

    Attributes:
        crops: Boxes (4, N) as top, left, height and width.
        operations: Applied one after the other, each a set of one for every image.
        flips: Whether to flip horizontally (N,).
        vertical_flips: Whether to flip vertically (N,).
        shifts: Pixels (2, N) by which the view moves down and right.
        erasing: Rectangles that become noise.
        mixing: How images of a part are mixed.
    """

    crops: Array | None = None
    operations: Sequence[Operations] = ()
    flips: Array | None = None
    vertical_flips: Array | None = None
    shifts: Array | None = None
    erasing: Erasing | None = None
    mixing: Mixing | None = None


def draw(recipe: Recipe, numbers: RandomNumbers, shape: tuple[int, int], seen: tuple[int, int], mixing: bool) -> Draws:
    """Draw all that a recipe asks for.

    Args:
        numbers: For the images.
        shape: (height, width) of the images.
        seen: (height, width) of what the model gets.
        mixing: Whether this part of the run mixes images.

    Example:
        >>> from convmixer.data.memory import Share
        >>> from convmixer.training import Recipe
        >>> from convmixer.training.augment import RandomNumbers, draw
        >>> share = Share(seed=0, epoch=0, batch_size=8, parts=1, own=range(1), steps=range(1))
        >>> draws = draw(Recipe(shift=2), RandomNumbers(share, [(0, 0)]), (32, 32), (32, 32), mixing=False)
        >>> draws.flips.shape, draws.shifts.shape
        ((8,), (2, 8))
    """
    crops = draw_crops(numbers, recipe.crop_scale, *shape) if recipe.crop_scale < 1 and not recipe.stream else None
    count, level = (1, None) if recipe.trivial_augment else recipe.rand_augment
    operations = [draw_operations(numbers, level, *shape) for _ in range(count)]
    operations += draw_jitter(numbers, recipe.color_jitter) if recipe.color_jitter else []
    flips, vertical = (numbers.uniform(1)[0] < p if p else None for p in (recipe.flip, recipe.vertical_flip))
    shifts = None
    if recipe.shift:
        shifts = (numbers.uniform(2) * (2 * recipe.shift + 1)).astype(np.int64) - recipe.shift
    erasing = draw_erasing(numbers, recipe.random_erasing, *seen) if recipe.random_erasing else None
    return Draws(
        crops, operations, flips, vertical, shifts, erasing, draw_mixing(numbers, recipe, *seen) if mixing else None
    )


# ---- operations, on the device: x uint8 (K, C, H, W), p (K, 6) as `_parameters` gives it ----------------------------


def _parameters(op: Array, value: Array, height: int, width: int) -> Array:
    """Return what the operations take (N, 6) float32.

    Geometric ones take the matrix [a, b, c, d, e, f] that maps a position in the output to one in the input, in pixels
    from the centre; the blending ones take (factor, 1 - factor), the others one number.
    """
    parameters = np.zeros((len(op), 6))
    parameters[:, 0] = value
    parameters[:, 1] = 1 - value
    moved = (op >= Op.SHEAR_X) & (op <= Op.ROTATE)
    parameters[moved] = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    chosen = {kind: op == kind for kind in Op}
    v = value[chosen[Op.SHEAR_X]]
    parameters[chosen[Op.SHEAR_X], 1:3] = np.stack(
        [v, v * height / 2], 1
    )  # about the upper left corner, as torchvision
    v = value[chosen[Op.SHEAR_Y]]
    parameters[chosen[Op.SHEAR_Y], 3] = v
    parameters[chosen[Op.SHEAR_Y], 5] = v * width / 2
    parameters[chosen[Op.TRANSLATE_X], 2] = -value[chosen[Op.TRANSLATE_X]]
    parameters[chosen[Op.TRANSLATE_Y], 5] = -value[chosen[Op.TRANSLATE_Y]]
    turn = np.radians(value[chosen[Op.ROTATE]])
    cos, sin, zero = np.cos(turn), np.sin(turn), np.zeros_like(turn)
    parameters[chosen[Op.ROTATE]] = np.stack([cos, -sin, zero, sin, cos, zero], 1)
    parameters[chosen[Op.POSTERIZE], 0] = 256 - 2.0 ** (8 - value[chosen[Op.POSTERIZE]])  # a mask of the bits that stay
    parameters[chosen[Op.SOLARIZE], 0] = np.ceil(np.float32(255 * value[chosen[Op.SOLARIZE]]))
    return parameters.astype(np.float32)


def _column(p: Tensor, index: int = 0) -> Tensor:
    return p[:, index].view(-1, 1, 1, 1)


def _bytes(x: Tensor) -> Tensor:
    """Round down to uint8, as torchvision does; `x` is overwritten."""
    return x.clamp_(0, 255).to(torch.uint8)


def _blend(x: Tensor, other: Tensor, p: Tensor) -> Tensor:
    # No fused multiply-add: its rounding depends on the address in memory, so that a resumed run would not be exact.
    return _bytes(x.float().mul_(_column(p)).add_(other * _column(p, 1)))


def grey(x: Tensor) -> Tensor:
    """Return the luminance (K, 1, H, W) in whole float32 numbers."""
    if x.shape[1] == 1:
        return x.float()
    red, green, blue = (channel.float() for channel in x.unbind(1))
    return red.mul_(0.2989).add_(green.mul_(0.587)).add_(blue.mul_(0.114)).floor_().unsqueeze(1)


def affine(x: Tensor, p: Tensor, fill: Tensor) -> Tensor:
    """Map images by nearest-neighbour sampling; `fill` (C, 1, 1) is outside of the image."""
    height, width = x.shape[2:]
    rows = torch.arange(height, dtype=torch.float32, device=x.device).view(1, -1, 1) - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float32, device=x.device).view(1, 1, -1) - (width - 1) / 2
    a, b, c, d, e, f = p.view(-1, 6, 1, 1).unbind(1)
    column = (a * columns + (b * rows + c)).add_((width - 1) / 2).round_()
    row = (d * columns + (e * rows + f)).add_((height - 1) / 2).round_()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = row.clamp_(0, height - 1).long().mul_(width).add_(column.clamp_(0, width - 1).long())
    taken = x.flatten(2).gather(2, index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
    return torch.where(inside.unsqueeze(1), taken, fill)


def brightness(x: Tensor, p: Tensor) -> Tensor:
    return _bytes(x.float().mul_(_column(p)))


def color(x: Tensor, p: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else _blend(x, grey(x), p)


def contrast(x: Tensor, p: Tensor) -> Tensor:
    total = grey(x).to(torch.uint8).sum((1, 2, 3), dtype=torch.int64)  # exact in any order
    return _blend(x, (total.float() / math.prod(x.shape[2:])).view(-1, 1, 1, 1), p)


def sharpness(x: Tensor, p: Tensor) -> Tensor:
    """Blend with a blurred copy: the mean of 3 x 3 pixels in which the middle one counts five times."""
    if min(x.shape[2:]) <= 2:
        return x
    result = x.float()
    inner = result[:, :, 1:-1, 1:-1]
    lines = result[:, :, :-2] + result[:, :, 1:-1] + result[:, :, 2:]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
    blurred = around.add_(inner * 4).div_(13).round_()
    inner.add_(blurred.sub_(inner).mul_(_column(p, 1)))
    return _bytes(result)


def posterize(x: Tensor, p: Tensor) -> Tensor:
    return x & _column(p).to(torch.uint8)


def solarize(x: Tensor, p: Tensor) -> Tensor:
    return torch.where(x >= _column(p).to(torch.uint8), ~x, x)


def autocontrast(x: Tensor, _p: Tensor) -> Tensor:
    low, high = (reduced.float() for reduced in (x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return _bytes(x.float().sub_(torch.where(flat, 0.0, low)).div_(scale))


def equalize(x: Tensor, _p: Tensor) -> Tensor:
    """Equalize as Pillow does: each channel's values by their rank, the highest left out of the count."""
    values = x.flatten(0, 1).flatten(1).long()
    ones = torch.ones(1, 1, dtype=torch.int32, device=x.device).expand_as(values)
    counts = torch.zeros(len(values), 256, dtype=torch.int32, device=x.device).scatter_add_(1, values, ones)
    highest = counts.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - highest) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255).to(torch.uint8)
    return torch.where(step.view(*x.shape[:2], 1, 1) > 0, table.gather(1, values).view_as(x), x)


def hue(x: Tensor, p: Tensor) -> Tensor:
    """Turn the colours around the circle of hues by a part of it."""
    if x.shape[1] == 1:
        return x
    red, green, blue = (x.float() / 255.0).unbind(1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    # In sixths of the circle: between which two of the main colours, and how far.
    sixth = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + p[:, 0].view(-1, 1, 1) * 6
    ramps = torch.stack([(sixth + start).remainder_(6) for start in (5, 3, 1)], 1)
    result = high.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(ramps, 4 - ramps).clamp_(0, 1)
    return _bytes(result.mul_(255.999))


FUNCTIONS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    Op.BRIGHTNESS: brightness,
    Op.COLOR: color,
    Op.CONTRAST: contrast,
    Op.SHARPNESS: sharpness,
    Op.POSTERIZE: posterize,
    Op.SOLARIZE: solarize,
    Op.AUTOCONTRAST: autocontrast,
    Op.EQUALIZE: equalize,
    Op.HUE: hue,
}


# ---- geometry of all images -----------------------------------------------------------------------------------------


def crop(x: Tensor, boxes: Tensor) -> Tensor:
    """Cut boxes (4, N) out of images uint8 (N, C, H, W), and resize them to (H, W) by bilinear interpolation."""
    size = x.shape[2:]
    positions = []
    for start, length, side in zip(boxes[:2], boxes[2:], size, strict=True):
        start, length = start.float().view(-1, 1), length.float().view(-1, 1)
        position = (torch.arange(side, dtype=torch.float32, device=x.device) + 0.5) * (length / side) - 0.5
        inside = torch.minimum(position.clamp_(min=0), length - 1) + start  # the border belongs to the box
        positions.append((2 * inside + 1) / side - 1)  # as `grid_sample` counts
    rows, columns = positions
    grid = torch.stack([columns[:, None, :].expand(-1, *size), rows[:, :, None].expand(-1, *size)], 3)
    result: Tensor = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
    return result.round_().to(torch.uint8)


def _sources(shift: Tensor, flip: Tensor, side: int) -> Tensor:
    """Return where `side` pixels of a line come from (N, side): shifted with reflected borders, after a flip."""
    position = (torch.arange(side, device=shift.device) + shift[:, None]).abs_()
    position = side - 1 - (side - 1 - position).abs_()
    return torch.where(flip[:, None] > 0, side - 1 - position, position)


def move(x: Tensor, moves: Tensor) -> Tensor:
    """Take, flip and shift images; `moves` (5, N) has the image, vertical flip, flip, and shifts down and right."""
    channels, height, width = x.shape[1:]
    image, vertical, flip, down, right = moves
    first = image.view(-1, 1) * channels + torch.arange(channels, device=x.device)
    lines = first[:, :, None] * height + _sources(down, vertical, height)[:, None]
    result = x.reshape(-1, width).index_select(0, lines.flatten()).view(-1, channels, height, width)
    return result.gather(3, _sources(right, flip, width)[:, None, None].expand_as(result))


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie in boxes (4, N): (N, 1, height, width)."""
    top, left, tall, wide = box.view(4, -1, 1)
    rows, columns = (torch.arange(side, device=box.device) for side in (height, width))
    down = (rows >= top) & (rows < top + tall)
    across = (columns >= left) & (columns < left + wide)
    inside: Tensor = down[:, :, None] & across[:, None, :]
    return inside.unsqueeze(1)


# ---- chunks ---------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What the model gets for a part of a step.

    Attributes:
        inputs: Normalized float32 (B, C, S, S).
        targets: Labels (B,) int64, or where images are mixed the share of each class (B, classes) float32.
        labels: Of the images themselves (B,) int64.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor


class Augment:
    """Changes images at random as a recipe says, and normalizes them.

    Args:
        recipe: Which changes, and how strong.
        config: A model's preprocessing: `input_size`, `mean` and `std` per channel, of pixels in [0, 1].
        classes: Number of classes.
        device: Where the images are.

    Raises:
        ArgumentError: Translations by more than the images have pixels.
    """

    def __init__(self, recipe: Recipe, config: dict[str, Any], classes: int, device: torch.device) -> None:
        self.recipe, self.classes, self.device = recipe, classes, device
        self.channels, height, width = config["input_size"]
        self.shape = (height, width)
        if recipe.shift >= min(self.shape):
            raise ArgumentError(
                f"recipe field shift={recipe.shift}: images of {height}x{width} pixels, reflected at their borders, "
                f"move by at most {min(self.shape) - 1}: give less"
            )
        mean, std = (torch.tensor(config[name], dtype=torch.float64).view(-1, 1, 1) for name in ("mean", "std"))
        self.scale, self.offset = (t.float().to(device) for t in (1 / (255 * std), -mean / std))
        fill = (255 * mean).round() if recipe.fill == "mean" else torch.zeros_like(mean)
        self.fill = fill.to(torch.uint8).to(device)
        self.noise: Tensor | None = None

    def seen(self, size: int | None) -> tuple[int, int]:
        """Return (height, width) of what the model gets if the shorter side has `size` pixels; None: as it is."""
        if size is None:
            return self.shape
        height, width = (round(side * size / min(self.shape)) for side in self.shape)
        return height, width

    def sizes(self) -> set[tuple[int, int]]:
        """Return every (height, width) of what the model gets during the run."""
        return {self.seen(size) for _, size in self.recipe.image_sizes} or {self.shape}

    def prepared(self, source: ImageSet, share: Share, done: Callable[[int], float]) -> Iterator[Part]:
        """Yield the parts of an epoch, ready for the model; several are computed at once.

        Args:
            source: The images.
            share: What this process takes of the epoch.
            done: Returns the part of the run that is over before a step.
        """
        recipe = self.recipe
        if recipe.random_erasing:
            rng = np.random.default_rng((share.seed, share.epoch, 0, 1))
            length = NOISE + self.channels * max(map(math.prod, {self.shape, *self.sizes()}))
            self.noise = self._send(rng.standard_normal(length, dtype=np.float32))

        def phase(item: tuple[Batch, tuple[int, int]]) -> tuple[int | None, bool]:
            over = done(item[1][0])
            return image_size(recipe, over), bool(recipe.mixup or recipe.cutmix) and over < recipe.mix_until

        pixels = share.batch_size // share.parts * math.prod(self.shape)
        most = min(max(1, PIXELS.get(self.device.type, PIXELS_ELSEWHERE) // pixels), source.at_once)
        positions = ((step, part) for step in share.steps for part in share.own)
        batches = zip(
            source.parts(share), positions, strict=False
        )  # the images end first, and close what they have open
        for (size, mixing), alike in itertools.groupby(batches, phase):
            while chunk := list(itertools.islice(alike, most)):
                numbers = RandomNumbers(share, [position for _, position in chunk])
                draws = draw(recipe, numbers, self.shape, self.seen(size), mixing)
                yield from self.parts([batch for batch, _ in chunk], draws, size)

    def parts(self, batches: Sequence[Batch], draws: Draws, size: int | None) -> Iterator[Part]:
        """Yield some parts of equal size, changed as drawn."""
        count = len(batches)
        pixels, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        inputs, targets = self(pixels, draws, size), labels
        if draws.mixing:
            inputs, targets = self.mix(inputs, labels, draws.mixing, count)
        yield from map(Part, inputs.chunk(count), targets.chunk(count), labels.chunk(count))

    def __call__(self, pixels: Tensor, draws: Draws, size: int | None = None) -> Tensor:
        """Map uint8 (N, C, H, W) to normalized float32 (N, C, S, S), unmixed; `size` is the shorter side."""
        x = pixels
        if draws.crops is not None:
            x = crop(x, self._send(draws.crops))
        order = np.arange(len(x))  # of the images, after those that are sorted by operation
        for op, value in draws.operations:
            by_op = op[order].argsort(kind="stable")
            order = order[by_op]
            x = self._operate(x.index_select(0, self._send(by_op)), op[order], value[order])
        x = self._move(x, order, draws)
        if size is not None and size != min(x.shape[-2:]):
            x = v2.functional.resize(x, list(self.seen(size)), antialias=True)
        result: Tensor = x.float().mul_(self.scale).add_(self.offset)
        if draws.erasing and len(draws.erasing.image):
            self._erase(result, draws.erasing)
        return result

    def _send(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":  # else the copy would wait for all that the device has to do
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _operate(self, x: Tensor, op: Array, value: Array) -> Tensor:
        """Apply operations to images in the order of the operations; x is overwritten."""
        parameters = self._send(_parameters(op, value, *x.shape[2:]))
        bounds = np.searchsorted(op, [Op.SHEAR_X, Op.BRIGHTNESS])
        moved = slice(*bounds.tolist())
        if moved.start < moved.stop:
            x[moved] = affine(x[moved], parameters[moved], self.fill)
        for kind, change in FUNCTIONS.items():
            start, stop = np.searchsorted(op, [kind, kind + 1]).tolist()
            if start < stop:
                x[start:stop] = change(x[start:stop], parameters[start:stop])
        return x

    def _move(self, x: Tensor, order: Array, draws: Draws) -> Tensor:
        """Put images back into the order before the operations, with flips and shifts."""
        image = order.argsort()
        if draws.flips is None and draws.vertical_flips is None and draws.shifts is None:
            return x.index_select(0, self._send(image)) if draws.operations else x
        moves = np.zeros((5, len(image)), dtype=np.int64)
        moves[0] = image
        for row, drawn in ((1, draws.vertical_flips), (2, draws.flips), (slice(3, 5), draws.shifts)):
            moves[row] = 0 if drawn is None else drawn
        return move(x, self._send(moves))

    def _erase(self, x: Tensor, erasing: Erasing) -> None:
        """Replace rectangles of x (N, C, S, S) by noise."""
        assert self.noise is not None
        image, start = self._send(erasing.image), self._send(erasing.start)
        noise = self.noise.unfold(0, math.prod(x.shape[1:]), 1).index_select(0, start).view(-1, *x.shape[1:])
        inside = _inside(self._send(erasing.box), *x.shape[2:])
        x.index_copy_(0, image, torch.where(inside, noise, x.index_select(0, image)))

    def mix(self, x: Tensor, labels: Tensor, mixing: Mixing, parts: int) -> tuple[Tensor, Tensor]:
        """Mix each image with the one that mirrors its position in its part; x (N, C, S, S) is overwritten.

        Returns:
            The images and the share of each class (N, classes).
        """
        mirror = np.arange(len(x)).reshape(parts, -1)[:, ::-1].ravel()
        blended = np.flatnonzero((mixing.weight < 1) & ~mixing.cut)
        cut = np.flatnonzero(mixing.cut)
        own = self._send(mixing.weight.astype(np.float32))
        partners = self._send(mirror)

        def both(chosen: Array) -> tuple[Tensor, Tensor, Tensor]:
            image = self._send(chosen)
            return image, x.index_select(0, image), x.index_select(0, partners.index_select(0, image))

        i, a, b = both(blended)
        j, c, d = both(cut)
        weight = own.index_select(0, i).view(-1, 1, 1, 1)
        inside = _inside(self._send(mixing.box[:, cut]), *x.shape[2:])
        x.index_copy_(0, i, a.mul_(weight).add_(b.mul_(1 - weight)))
        x.index_copy_(0, j, torch.where(inside, d, c))
        targets = torch.zeros(len(x), self.classes, dtype=own.dtype, device=x.device).scatter_(
            1, labels[:, None], own[:, None]
        )
        other = labels.index_select(0, partners)[:, None]
        return x, targets.scatter_add_(1, other, (1 - own)[:, None])
