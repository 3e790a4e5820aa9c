"""`convmixer train`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from convmixer.cli import options
from convmixer.cli.console import Command, complain, progress, say
from convmixer.errors import TrainingStopped
from convmixer.training import Recipe, get_recipe
from convmixer.training import train as run_training

_KINDS = {tuple: "a list such as [2, 12]", bool: "true or false", int: "a whole number", float: "a number"}


@click.command(cls=Command)
@click.argument("recipe")
@options.data
@click.option("--val", help="A validation set, instead of one in the data and of images held out.")
@click.option("--test", "tests", multiple=True, help="A further test set; may be given again.")
@options.labels
@click.option("--output", type=options.PATH, help="Folder of the run.  [default: runs/RECIPE]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe.")
@options.data_root
@options.download
@click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and say which.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode a stream.  [default: one per core]")
@click.option("--resume", is_flag=True, help="Resume the run in OUTPUT.")
@options.device
@options.precision("auto")
@click.option("--compile", is_flag=True, help="Use torch.compile; it needs a C++ compiler on a CPU, Triton on a GPU.")
@click.option(
    "--fused/--no-fused",
    default=None,
    help="Use fused blocks, which keep less than half of the activations, or not.  [default: on a CPU with kernels]",
)
@click.option(
    "--graph/--no-graph", default=None, help="Run steps as CUDA graphs, or not.  [default: where they can be]"
)
@click.option("--tracker", "trackers", multiple=True, help="A tracker of accelerate's, such as tensorboard.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    recipe: str,
    data: str,
    output: Path | None,
    settings: tuple[str, ...],
    fused: bool | None,
    graph: bool | None,
    **further: Any,
) -> None:
    """Train by RECIPE, such as cifar10 or, made for a CPU, cifar10-cpu.

    SIGTERM and Ctrl-C save the run to the step; --resume goes on from there. While --compile compiles they end it at
    once, and what was saved before is kept.
    """
    chosen = get_recipe(recipe, **dict(_setting(text) for text in settings))
    further |= {"fused": "auto" if fused is None else fused, "graph": "auto" if graph is None else graph}
    try:
        run_training(chosen, data, output or Path("runs") / recipe, progress=progress, report=say, **further)
    except TrainingStopped as stop:
        complain(stop)
        ctx.exit(128 + stop.signal)


def _setting(text: str) -> tuple[str, Any]:
    """Return the field of the recipe and the value that FIELD=VALUE gives it."""
    name, equals, value = text.partition("=")
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    if not equals or name not in fields:
        raise click.BadParameter(f"{text!r}: give FIELD=VALUE with a field of {', '.join(fields)}")
    kind: Any = type(fields[name].default)
    if "tuple" in str(fields[name].type) and value.startswith("["):
        kind = tuple
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[value.lower()]
        if kind is tuple:
            return name, tuple(tuple(item) if isinstance(item, list) else item for item in json.loads(value))
        return name, kind(value)
    except (ValueError, TypeError, KeyError) as error:
        raise click.BadParameter(f"{text!r}: {value!r} is not {_KINDS[kind]}") from error
