"""The images of a run: training, validation and test, at the size that its model takes."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convmixer.data.memory import Fit, ImageSet, fitting, hold_out, load_images
from convmixer.data.readers import READERS, SHARDS, has_split
from convmixer.data.stream import open_stream
from convmixer.errors import ArgumentError, list_first
from convmixer.factory import create_model
from convmixer.training.checks import check_hold_out
from convmixer.training.recipe import Recipe
from convmixer.training.validation import Progress


@dataclass(frozen=True)
class Sources:
    """Where the images of a run come from, and how they are read: the arguments of `train` of these names."""

    data: str | Path
    val: str | Path | None
    tests: Sequence[str | Path]
    labels: str | Path | None
    data_root: str | Path | None
    download: bool
    skip_unreadable: bool
    workers: int | None


@dataclass(frozen=True)
class Splits:
    """The images that a run trains on, validates after every epoch, and tests at the end, the last by name."""

    training: ImageSet
    validation: ImageSet
    tests: dict[str, ImageSet]

    def record(self) -> dict[str, Any]:
        """Return what must be the same when the run is resumed."""
        own = self.validation.record()
        validated = {f"validation {key}": own[key] for key in ("labels", "names") if key in own}
        return self.training.record() | {"validation": len(self.validation)} | validated

    def __str__(self) -> str:
        tests = ", ".join(f"{len(images)} test images ({name})" for name, images in self.tests.items())
        return f"{len(self.training)} training, {len(self.validation)} validation images, {tests or 'no test images'}"


def source_name(source: str | Path) -> str:
    """Return the name of a data set without the folder that holds it."""
    if str(source).startswith((*READERS, SHARDS)):
        return str(source)
    return os.path.basename(os.path.abspath(source))  # also of "."


def read_splits(
    sources: Sources, recipe: Recipe, processes: int, progress: Progress, report: Callable[[str], None]
) -> Splits:
    """Read all splits, and report which images were taken for what.

    Args:
        processes: Number of processes that share a stream.
    """
    read = _reader(sources, recipe, processes, progress, report)
    images = read(sources.data, "train", labels=sources.labels)
    has_own = {
        split: has_split(sources.data, split, labels=sources.labels, root=sources.data_root, report=report)
        for split in ("validation", "test")
    }
    training = images
    if sources.val is not None:
        validation = read(sources.val, "validation", classes=images.classes)
    elif has_own["validation"]:
        validation = read(sources.data, "validation", classes=images.classes, labels=sources.labels)
    else:
        check_hold_out(recipe, str(sources.data))
        training, validation = hold_out(images, recipe.validation_fraction, recipe.seed)
        held_out = f"{len(validation):,} of the training images, held out by validation_fraction"
        report(f"validation: {held_out if len(validation) else 'no images'}")
        if len(validation):
            _report_lost(training, report)
    tests: dict[str, ImageSet] = {}
    if has_own["test"]:
        tests[source_name(sources.data)] = read(sources.data, "test", classes=images.classes, labels=sources.labels)
    for source in sources.tests:
        tests[_free_name(source, tests)] = read(source, "test", classes=images.classes)
    if not tests:
        report("test: no images")
    return Splits(training.balanced() if recipe.balanced else training, validation, tests)


def _report_lost(training: ImageSet, report: Callable[[str], None]) -> None:
    """Report the classes of which all images were held out."""
    counts = training.targets().bincount(minlength=len(training.classes)).tolist()
    lost = [name for name, count in zip(training.classes, counts, strict=True) if not count]
    if lost:
        report(f"no training image is left of {list_first(lost)}: all were held out. Give --val, or more images")


def _free_name(source: str | Path, taken: Container[str]) -> str:
    """Return a name of a test set that no other has: that of its folder, its path, or its path with a number."""
    numbered = (f"{source} ({number})" for number in itertools.count(2))
    return next(name for name in itertools.chain((source_name(source), str(source)), numbered) if name not in taken)


def _reader(
    sources: Sources, recipe: Recipe, processes: int, progress: Progress, report: Callable[[str], None]
) -> Callable[..., ImageSet]:
    """Return `read(source, split, classes=None, labels=None)`, into memory or as a stream as the recipe says."""
    checkpoint = recipe.checkpoint or None  # may bring an image size of its own
    model = create_model(recipe.model, checkpoint=checkpoint, device="meta", **recipe.sizes)
    config: dict[str, Any] = model.pretrained_cfg
    height, width = recipe.input_size or config["input_size"][1:]
    for name, sides in (
        ("input_size", (height, width)),
        ("image_sizes", tuple(side for _, side in recipe.image_sizes)),
    ):
        if min(sides, default=model.patch_size) < model.patch_size:
            raise ArgumentError(
                f"recipe field {name}={getattr(recipe, name)!r}: {min(sides)} pixels are less than a patch of "
                f"{recipe.model}, {model.patch_size} pixels: give more"
            )
    fit = Fit((recipe.in_chans, height, width), **fitting(config), draft=recipe.draft)
    options: dict[str, Any] = {
        "skip_unreadable": sources.skip_unreadable,
        "root": sources.data_root,
        "download": sources.download,
        "report": report,
    }
    if recipe.stream:
        mean = config["mean"] if recipe.in_chans == 3 else (sum(config["mean"]) / len(config["mean"]),)
        options |= {"mean": mean, "workers": sources.workers, "processes": processes}
        return functools.partial(open_stream, recipe=recipe, fit=fit, **options)

    def read(source: str | Path, split: str, **labelling: Any) -> ImageSet:
        return load_images(
            source,
            split,
            fit.size,
            draft=recipe.draft,
            progress=lambda items: progress(items, f"reading {split}"),
            **fitting(config),
            **options,
            **labelling,
        )

    return read
