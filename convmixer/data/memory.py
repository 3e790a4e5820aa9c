"""Labelled images: what training and validation need of a set, and sets that are decoded once into memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from convmixer.data.images import enough, read_image
from convmixer.data.layout import File
from convmixer.data.readers import FileSplit, open_split
from convmixer.errors import ArgumentError, DataError, list_first

if TYPE_CHECKING:
    from convmixer.training.recipe import Recipe

Batch = tuple[Tensor, Tensor]  # pixels uint8 (B, C, H, W), labels int64 (B,)
T = TypeVar("T", bound="ImageSet")


def seed_all(*numbers: int) -> None:
    """Let all randomness follow from these numbers, however many processes share the work."""
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "big")
    torch.manual_seed(seed)
    random.seed(seed)  # timm's augmentation
    np.random.seed(seed % 2**32)  # the same


@dataclass(frozen=True)
class Share:
    """What one process takes of an epoch.

    Attributes:
        seed: Of the run.
        epoch: Number of the epoch.
        batch_size: Images of a step, over all processes.
        parts: Equal parts of a step, over all processes.
        own: The parts of this process.
        steps: Those that the epoch has yet to do.
    """

    seed: int
    epoch: int
    batch_size: int
    parts: int
    own: range
    steps: range

    def index(self, count: int, device: torch.device | str = "cpu", odds: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the parts of this process of an epoch over `count` images in an order of its own.

        With odds (`count`,) each image of a step is drawn by them, with replacement.
        """
        seed_all(self.seed, self.epoch)
        order = torch.randperm(count) if odds is None else odds.multinomial(count, replacement=True)
        order = order.to(device)
        for step in self.steps:
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].view(self.parts, -1)
            yield from batch[self.own.start : self.own.stop]


class ImageSet(Protocol):
    """Labelled images for training and validation: in memory, or decoded when they are needed.

    Attributes:
        classes: Class names by label.
        unreadable: What was said of each image that could not be read.
    """

    classes: tuple[str, ...]

    @property
    def unreadable(self) -> set[str]: ...

    @property
    def at_once(self) -> int:
        """How many parts of an epoch can be taken together without a long wait."""

    def __len__(self) -> int: ...

    def to(self: T, device: torch.device) -> T:
        """Return the same with batches on a device."""

    def subset(self: T, index: Tensor) -> T:
        """Return the images with these numbers."""

    def targets(self) -> Tensor:
        """Return the label of each image (N,), without decoding any."""

    def balanced(self: T) -> T:
        """Return the same, drawn for training with replacement so that all classes are as frequent."""

    def record(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed."""

    def parts(self, share: Share) -> Iterator[Batch]:
        """Yield the training images of an epoch, part by part."""

    def in_order(self, batch_size: int) -> Iterable[Batch]:
        """Yield all images as they are for validation; the last batch may be smaller."""


@dataclass
class Images:
    """A split in memory.

    Attributes:
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,).
        classes: Class names by label.
        odds: By which each image is drawn for training (N,); none takes each once in an epoch.
        names: A hash of the names of all files of the split; "" of images that are not in files.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    odds: Tensor | None = None
    names: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unreadable(self) -> set[str]:
        """Nothing: `load_images` has reported it already."""
        return set()

    @property
    def at_once(self) -> int:
        return sys.maxsize

    def to(self, device: torch.device) -> Images:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], odds=None)

    def targets(self) -> Tensor:
        return self.labels.cpu()

    def balanced(self) -> Images:
        return replace(self, odds=balancing_odds(self))

    def record(self) -> dict[str, Any]:
        named = {"names": self.names} if self.names else {}
        return {"images": len(self), "classes": list(self.classes), "labels": labels_digest(self.labels), **named}

    def parts(self, share: Share) -> Iterator[Batch]:
        for index in share.index(len(self), self.pixels.device, self.odds):
            yield self.pixels[index], self.labels[index]

    def in_order(self, batch_size: int) -> Iterable[Batch]:
        return list(zip(self.pixels.split(batch_size), self.labels.split(batch_size), strict=True))


def load_images(
    source: str | Path,
    split: str,
    size: tuple[int, int, int],
    *,
    classes: tuple[str, ...] | None = None,
    labels: str | Path | None = None,
    interpolation: str = "bilinear",
    crop_mode: str = "center",
    crop_pct: float = 1.0,
    skip_unreadable: bool = False,
    draft: bool = True,
    root: str | Path | None = None,
    download: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    report: Callable[[str], None] = print,
) -> Images:
    """Decode a split into memory.

    Args:
        source: A folder with `train`, `val` and `test`, in any usual spelling, as folders or tars of class folders; one
            such folder or tar; a table with the columns image and label, with the images next to it; or a name for
            timm's readers: `torch/cifar10`, `hfds/uoft-cs/cifar10`.
        split: "train", "validation" or "test". A source without splits is all of any; without test images, those for
            validation stand in for them.
        size: (C, H, W): images of another size are resized.
        interpolation: "bilinear", "bicubic" or another of torchvision's modes.
        crop_mode: "center" resizes the shorter side and crops to the centre, "squash" resizes both sides.
        crop_pct: Part of the resized shorter side that the crop keeps.
        classes: Class names that the labels must follow, as when a test set must agree with a training set; the source
            may lack some of them. Without them, training images must be of two classes at least.
        labels: A table, as CSV, TSV or Parquet, with the columns image and label, and if need be split, instead of
            class folders. Images are named by their paths from `source`, or by the end of these.
        skip_unreadable: Leave out images that cannot be read, and report how many and which.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        root: Where downloaded data sets lie: by default `data` for `torch/`, the Hub's cache for `hfds/`.
        download: Let `torch/` data sets download what is missing.
        progress: Wraps the iteration, for a progress bar.
        report: Takes a line about what was taken for the split, and one about unreadable images.

    Raises:
        DataError: There is nothing, there are no images, or other classes than asked for, or an image cannot be read.
        ArgumentError: `size` has neither 1 nor 3 channels, or `crop_mode` or `interpolation` is not one of these.
        DependencyError: A library that reads the data is not installed.

    Example:
        >>> from convmixer.data.memory import load_images
        >>> images = load_images("data/flowers", "test", (3, 32, 32))
        test: 6 images in 2 classes from flowers/test/
        >>> images.pixels.shape, images.classes
        (torch.Size([6, 3, 32, 32]), ('daisy', 'rose'))
    """
    if size[0] not in (1, 3):
        raise ArgumentError(f"training reads images with 1 or 3 channels; this model takes {size[0]}")
    opened = open_split(source, split, labels=labels, root=root, download=download)
    report(opened.taken)
    if classes is None and split == "train":
        opened.check_classes()
    index = opened.labels_in(classes or opened.classes)
    fit = Fit(size, interpolation, crop_mode, crop_pct, draft)
    _check_memory(opened.name, len(opened), size)
    pixels = torch.empty(len(opened), *size, dtype=torch.uint8)
    targets = torch.empty(len(opened), dtype=torch.int64)
    errors: dict[int, str] = {}
    for i, sample in zip(progress(range(len(opened))), opened.each(fit), strict=True):
        if not isinstance(sample, DataError):
            pixels[i], targets[i] = sample
        elif skip_unreadable:
            errors[i] = str(sample)
        else:
            raise sample
    if errors:
        shown = list_first(errors.values(), separator="; ")
        report(f"{len(errors)} of {len(opened)} images are left out: {shown}")
        if len(errors) == len(opened):
            raise DataError(f"no image of {opened.name!r} can be read: {shown}")
        readable = torch.tensor([i for i in range(len(opened)) if i not in errors])
        pixels, targets = pixels[readable], targets[readable]
    names = names_digest(opened.images) if isinstance(opened, FileSplit) else ""
    return Images(pixels, index[targets], classes or opened.classes, names=names)


def _check_memory(name: str, count: int, size: tuple[int, int, int]) -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        memory, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), count * math.prod(size)
        if needed > 0.8 * memory:
            raise DataError(
                f"the {count} images of {name!r} take {needed / 2**30:.1f} GiB, this machine has "
                f"{memory / 2**30:.1f} GiB of memory: train with --set stream=true, which reads them anew in each epoch"
            )


@dataclass(frozen=True)
class Fit:
    """Turns an image of any kind into uint8 (C, H, W) as a model takes it; arguments are those of `load_images`."""

    size: tuple[int, int, int]
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    crop_pct: float = 1.0
    draft: bool = True

    def __post_init__(self) -> None:
        """Raise an ArgumentError for what torchvision or this class would not do, or would do otherwise."""
        modes = [mode.value for mode in v2.InterpolationMode]
        valid = {"crop_mode": (self.crop_mode, ("center", "squash")), "interpolation": (self.interpolation, modes)}
        for name, (value, values) in valid.items():
            if value not in values:
                raise ArgumentError(f"{name}={value!r}: labelled images are read with {' or '.join(values)}")

    def __call__(self, source: Any) -> Tensor:
        channels, height, width = self.size
        least = enough(height, width, self.crop_pct) if self.draft else None
        image: Tensor = v2.functional.pil_to_tensor(read_image(source, channels, least=least))
        if image.shape == self.size and self.crop_pct == 1:
            return image
        sides = targets = [math.floor(side / self.crop_pct) for side in self.size[1:]]
        if self.crop_mode != "squash":  # the smallest of this shape that covers both targets
            target, side = max(zip(targets, image.shape[-2:], strict=True), key=lambda pair: pair[0] / pair[1])
            # As timm has it: torchvision's Resize cuts fractions off, and is used for squares; ResizeKeepRatio rounds.
            whole: Callable[[float], int] = int if len(set(targets)) == 1 else round
            sides = [max(t, whole(target * n / side)) for t, n in zip(targets, image.shape[-2:], strict=True)]
        image = v2.functional.resize(image, sides, v2.InterpolationMode(self.interpolation), antialias=True)
        result: Tensor = v2.functional.center_crop(image, list(self.size[1:]))
        return result


def labels_digest(labels: Tensor) -> str:
    """Return a short hash of labels (N,) in their order."""
    return hashlib.blake2b(labels.cpu().numpy().tobytes(), digest_size=8).hexdigest()


def names_digest(files: Iterable[File]) -> str:
    """Return a short hash of the names of files, in their order and below the folder of their split."""
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        found.update(os.fsencode(file.name) + b"\n")
    return found.hexdigest()


def _class_counts(targets: Tensor, classes: int) -> Tensor:
    """Count the images of each class, at least 1 (C,)."""
    return targets.bincount(minlength=classes).clamp(min=1)


def balancing_odds(images: ImageSet) -> Tensor:
    """Return for each image the inverse of the number of images of its class (N,)."""
    targets = images.targets()
    return (1 / _class_counts(targets, len(images.classes)).double())[targets]


def class_weights(recipe: Recipe, images: ImageSet) -> Tensor | None:
    """Return what a recipe multiplies the loss of each class by, (C,); None if all classes are alike.

    "balanced" is the number of images over that of classes times that of the images of the class.

    Raises:
        ArgumentError: Not one weight for each class.
    """
    if recipe.class_weights == "balanced":
        classes = len(images.classes)
        return len(images) / (classes * _class_counts(images.targets(), classes).float())
    if not recipe.class_weights:
        return None
    if len(recipe.class_weights) != len(images.classes):
        raise ArgumentError(
            f"class_weights={recipe.class_weights!r} has {len(recipe.class_weights)} weights: give one for each of the "
            f"{len(images.classes)} classes {', '.join(images.classes)}"
        )
    return torch.tensor(recipe.class_weights, dtype=torch.float32)


def fitting(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `load_images` and `Fit` that fit images as a model's configuration says."""
    return {name: config[name] for name in ("interpolation", "crop_mode", "crop_pct")}


def hold_out(images: T, fraction: float, seed: int) -> tuple[T, T]:
    """Split into (training, validation) at random, the same way for one seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = round(len(images) * fraction)
    return images.subset(order[count:].sort().values), images.subset(order[:count].sort().values)
