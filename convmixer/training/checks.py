"""A recipe, data and a machine may each be fine and still not go together: every such check, one function each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from convmixer.data.readers import SHARDS
from convmixer.errors import ArgumentError, DependencyError, is_count
from convmixer.native import library as native
from convmixer.ops.fused import cannot_compile
from convmixer.training.optimizers import takes_tensors
from convmixer.training.recipe import Recipe

if TYPE_CHECKING:
    from convmixer.training.splits import Sources, Splits


# ---- a recipe and a machine -----------------------------------------------------------------------------------------


def check_compiler(device: torch.device) -> None:
    """Raise a DependencyError if `torch.compile` cannot work on a device."""
    if lacking := native.inductor_lacks(device):
        raise DependencyError(f"compile {lacking}; or train without compile (--compile)")


def check_fused(recipe: Recipe, *, compile: bool) -> None:
    """Raise an error if a recipe cannot be trained with fused blocks."""
    if compile and (lacking := cannot_compile()):
        raise DependencyError(lacking)
    rates = {name: getattr(recipe, name) for name in ("block_drop_rate", "drop_path_rate")}
    if any(rates.values()):
        raise ArgumentError(
            f"{', '.join(f'{n}={rate}' for n, rate in rates.items() if rate)} of the recipe: fused blocks have "
            "neither; set them to 0, or leave fused out"
        )


def check_sync_batchnorm(recipe: Recipe, device: torch.device, *, fused: bool) -> None:
    """Raise an ArgumentError if BatchNorm cannot see the images of all processes."""
    if recipe.sync_batchnorm and device.type != "cuda" and not fused:
        raise ArgumentError(
            f"sync_batchnorm=True works only on GPUs, for which PyTorch has it, not on {device.type!r}: leave it "
            "out, or use fused blocks (fused=True, --fused), which have it on CPUs too"
        )


def check_batch_size(recipe: Recipe, processes: int) -> None:
    """Raise an ArgumentError if the processes cannot share a step equally."""
    parts = recipe.accumulate * processes
    if recipe.batch_size % parts or ((recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2):
        raise ArgumentError(
            f"batch_size={recipe.batch_size} does not divide into {processes} processes with "
            f"accumulate={recipe.accumulate} equal parts each, even ones for mixup and cutmix"
        )


def check_graph(
    graph: bool | Literal["auto"], recipe: Recipe, device: torch.device, precision: str, processes: int
) -> str:
    """Return why a step cannot be a CUDA graph, or ""; raise an ArgumentError if it was asked for all the same."""
    obstacle = why_no_graph(recipe, device, precision, processes)
    if not (isinstance(graph, bool) or graph == "auto"):
        raise ArgumentError(f"graph={graph!r}; valid: True, False, 'auto'")
    if graph is True and obstacle:
        raise ArgumentError(f"graph=True: {obstacle}; give 'auto', or False (--no-graph)")
    return obstacle


def why_no_graph(recipe: Recipe, device: torch.device, precision: str, processes: int) -> str:
    """Return why a step cannot be a CUDA graph, or ""."""
    reasons = {
        f"{device.type!r} is not a CUDA device": device.type != "cuda",
        f"{processes} processes exchange gradients within a step": processes > 1,
        f"accumulate={recipe.accumulate} makes several passes in a step": recipe.accumulate > 1,
        "float16 checks its gradients on the host": precision == "float16",
        f"the optimizer {recipe.opt!r} keeps numbers on the host": not takes_tensors(recipe.opt, device),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


# ---- a recipe and data ----------------------------------------------------------------------------------------------


def check_sources(recipe: Recipe, sources: Sources) -> None:
    """Raise an ArgumentError if data cannot be used as a recipe asks, before any are read."""
    data, workers = str(sources.data), sources.workers
    if isinstance(sources.tests, str):
        raise ArgumentError(f"tests={sources.tests!r}: give a list of test sets")
    shards = [source for source in map(str, (data, sources.val, *sources.tests)) if source.startswith(SHARDS)]
    if shards and not recipe.stream:
        raise ArgumentError(f"{shards[0]!r} is read from start to end: give stream=True (--set stream=true)")
    if sources.val is None and ".tar" in data:  # of others, reading says whether they have validation images
        check_hold_out(recipe, data)
    needs = {"balanced=True": recipe.balanced, "class_weights='balanced'": recipe.class_weights == "balanced"}
    for setting in (setting for setting, asked in needs.items() if asked and data.startswith(SHARDS)):
        raise ArgumentError(f"{setting} needs labels before images are read, which {data!r} has not: leave it out")
    if workers is not None and not (is_count(workers, 0) and recipe.stream):
        raise ArgumentError(
            f"workers={workers!r}: give at least 0, and only with stream=True (--set stream=true): images in memory "
            "need none"
        )


def check_hold_out(recipe: Recipe, data: str) -> None:
    """Raise an ArgumentError if validation images were to be held out of shards."""
    if data.startswith(SHARDS) and recipe.validation_fraction:
        raise ArgumentError(
            f"validation_fraction={recipe.validation_fraction}: shards are read from start to end, so no images of "
            f"{data!r} can be held out: give 0, or a validation set (--val)"
        )


def check_counts(recipe: Recipe, splits: Splits) -> None:
    """Raise an ArgumentError if there are too few images."""
    count = len(splits.training)
    if count < recipe.batch_size:
        raise ArgumentError(f"{count} training images do not fill one batch of {recipe.batch_size}")
    if recipe.patience and not len(splits.validation):
        raise ArgumentError(
            f"patience={recipe.patience} needs validation images: validation_fraction={recipe.validation_fraction} "
            f"of {count} images is none"
        )


def check_same_teacher(file: object, name: str, before: str | None, now: str | None) -> None:
    """Raise an ArgumentError if a run would be resumed with a teacher that answers otherwise.

    Args:
        file: Where the state of the run was saved.
        name: `teacher` of the recipe.
        before: `Teacher.checksum` at that time; None: an older version did not save it.
        now: `Teacher.checksum` of the teacher that was opened.
    """
    if before is not None and before != now:
        raise ArgumentError(
            f"cannot resume {str(file)!r}: teacher={name!r} is not the model that it was when the run began. Its "
            "weights, classes or preprocessing have changed: restore them, or train in another folder"
        )


_OTHERS = ("labels", "names", "validation labels", "validation names")


def check_same_data(file: object, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an ArgumentError if a run would be resumed with other data.

    Args:
        file: Where the state of the run was saved.
        before: `Splits.record` at that time.
        now: `Splits.record` of the data given.
    """
    if before.get("streams") != now.get("streams"):
        raise ArgumentError(
            f"cannot resume {str(file)!r}: {before.get('streams')} workers of all processes read the "
            f"shards, now {now.get('streams')}, which changes the order of the images"
        )
    if {**now, **before} != now:  # what an older version did not save is taken to be the same
        raise ArgumentError(
            f"cannot resume {str(file)!r} with other data: it had {before['images']} training images of "
            f"{len(before['classes'])} classes, here are {now['images']} of {len(now['classes'])}; validation "
            f"images: {before.get('validation', 'unknown')}, here {now['validation']}"
            + "".join(f"; other {key}" for key in _OTHERS if {**now, **before}.get(key) != now.get(key))
        )
