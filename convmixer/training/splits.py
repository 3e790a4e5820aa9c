"""The images of a run: training, validation and test, at the size that its model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convmixer.data.memory import Fit, Source, fitting, hold_out, load_images
from convmixer.data.readers import READERS, SHARDS, has_split
from convmixer.data.stream import open_stream
from convmixer.factory import create_model
from convmixer.training.checks import check_hold_out
from convmixer.training.recipes import Recipe
from convmixer.training.validation import Progress


def source_name(source: str | Path) -> str:
    """A data set without the place where it lies."""
    return str(source) if str(source).startswith((*READERS, SHARDS)) else Path(source).name


def read_splits(
    recipe: Recipe,
    data: str | Path,
    val: str | Path | None,
    tests: Sequence[str | Path],
    labels: str | Path | None,
    data_root: str | Path | None,
    download: bool,
    skip_unreadable: bool,
    workers: int | None,
    processes: int,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Source, Source, dict[str, Source]]:
    """Training, validation and test images, at the size that the model takes; says which were taken for what."""
    checkpoint = recipe.checkpoint or None  # may bring an image size of its own
    config: dict[str, Any] = create_model(recipe.model, checkpoint=checkpoint, device="meta").pretrained_cfg
    height, width = recipe.input_size or config["input_size"][1:]
    fit = Fit((recipe.in_chans, height, width), **fitting(config), draft=recipe.draft)
    common: dict[str, Any] = {
        "skip_unreadable": skip_unreadable,
        "root": data_root,
        "download": download,
        "report": say,
    }

    def read(
        source: str | Path, split: str, classes: tuple[str, ...] | None = None, labels: str | Path | None = None
    ) -> Source:
        if recipe.stream:
            mean = config["mean"] if recipe.in_chans == 3 else (sum(config["mean"]) / len(config["mean"]),)
            pool: dict[str, Any] = {"mean": mean, "workers": workers, "processes": processes}
            return open_stream(source, split, recipe, fit, classes=classes, labels=labels, **pool, **common)
        return load_images(
            source,
            split,
            fit.size,
            classes=classes,
            labels=labels,
            draft=recipe.draft,
            progress=lambda items: progress(items, f"reading {split}"),
            **fitting(config),
            **common,
        )

    images = read(data, "train", labels=labels)
    own = {split: has_split(data, split, labels=labels, root=data_root) for split in ("validation", "test")}
    training = images
    if val is None and not own["validation"]:
        check_hold_out(recipe, data)
    if val is not None:
        validation = read(val, "validation", images.classes)
    elif own["validation"]:
        validation = read(data, "validation", images.classes, labels)
    else:
        training, validation = hold_out(images, recipe.validation_fraction, recipe.seed)
        held = f"{len(validation):,} of the training images, held out by validation_fraction"
        say(f"validation: {held if len(validation) else 'no images'}")
    test_sets: dict[str, Source] = {}
    if own["test"]:
        test_sets[source_name(data)] = read(data, "test", images.classes, labels)
    for source in tests:
        name = source_name(source)
        test_sets[str(source) if name in test_sets else name] = read(source, "test", images.classes)
    if not test_sets:
        say("test: no images")
    return training.balanced() if recipe.balanced else training, validation, test_sets
