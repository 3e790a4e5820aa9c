"""A recipe, data and a machine may each be fine and not go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from convmixer.data.readers import SHARDS
from convmixer.errors import ArgumentError
from convmixer.training.optimizers import takes_tensors
from convmixer.training.recipes import Recipe


def check_together(
    recipe: Recipe,
    data: str | Path,
    val: str | Path | None,
    tests: Sequence[str | Path],
    where: torch.device,
    workers: int | None,
    fused: bool,
) -> None:
    """A recipe, data and a machine may each be fine and not go together."""
    shards = [source for source in map(str, (data, val, *tests)) if source.startswith(SHARDS)]
    if shards and not recipe.stream:
        raise ArgumentError(f"{shards[0]!r} is read from start to end: give stream=True (--set stream=true)")
    if val is None and ".tar" in str(data):  # of others, reading says whether they have validation images
        check_hold_out(recipe, data)
    needs = {"balanced=True": recipe.balanced, "class_weights='balanced'": recipe.class_weights == "balanced"}
    for setting in (setting for setting, asked in needs.items() if asked and str(data).startswith(SHARDS)):
        raise ArgumentError(f"{setting} needs labels before images are read, which {str(data)!r} has not: leave it out")
    if workers is not None and (workers < 0 or not recipe.stream):
        raise ArgumentError(
            f"workers={workers}: give at least 0, and only with stream=True (--set stream=true): images in memory need "
            "none"
        )
    if recipe.sync_batchnorm and where.type != "cuda" and not fused:
        raise ArgumentError(
            f"sync_batchnorm=True works on GPUs alone, since torch has it for them, not on {where.type!r}: leave it "
            "out, or use fused blocks (fused=True, --fused), which have it on CPUs too"
        )
    rates = {name: getattr(recipe, name) for name in ("block_drop_rate", "drop_path_rate")}
    if fused and any(rates.values()):
        raise ArgumentError(
            f"fused=True with {', '.join(f'{n}={rate}' for n, rate in rates.items() if rate)} of the recipe: fused "
            "blocks have neither; leave fused out, or set them to 0"
        )


def why_no_graph(recipe: Recipe, where: torch.device, precision: str, processes: int) -> str:
    """Why a step cannot be a CUDA graph, or ""."""
    reasons = {
        f"{where.type!r} is not a CUDA device": where.type != "cuda",
        f"{processes} processes exchange gradients within a step": processes > 1,
        f"accumulate={recipe.accumulate} makes several passes in a step": recipe.accumulate > 1,
        "float16 checks its gradients on the host": precision == "float16",
        f"the optimizer {recipe.opt!r} keeps numbers on the host": not takes_tensors(recipe.opt, where),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def check_hold_out(recipe: Recipe, data: str | Path) -> None:
    """An ArgumentError if validation images were to be held out of shards."""
    if str(data).startswith(SHARDS) and recipe.validation_fraction:
        raise ArgumentError(
            f"validation_fraction={recipe.validation_fraction}: shards are read from start to end, so no images of "
            f"{str(data)!r} can be held out: give 0, or a validation set (--val)"
        )
