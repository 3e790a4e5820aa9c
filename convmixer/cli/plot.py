"""`convmixer plot`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from convmixer import plots
from convmixer.cli import options
from convmixer.cli.console import Command, note, progress, say
from convmixer.errors import ArgumentError
from convmixer.factory import open_model
from convmixer.training.history import read_history


@click.command(cls=Command)
@click.argument("source", metavar="RUN_OR_MODEL")
@click.option("--output", type=options.PATH, help="Folder to write.  [default: RUN/plots or plots/MODEL]")
@click.option("--data", help="Test images for confusion and mistakes: folder, .tar, or a name such as torch/cifar10.")
@click.option("--image", help="A path or a URL of an image to show the class activation on.")
@options.device
def plot(source: str, output: Path | None, data: str | None, image: str | None, device: str) -> None:
    """Draw a run's history and a model's weights and mistakes.

    RUN_OR_MODEL is the folder of a run, a .safetensors file, or any name of create_model.
    """
    if output is None:
        named = Path("plots") / re.sub(r"[^\w.-]+", "_", source)
        output = Path(source) / "plots" if os.path.isdir(source) else named
    for name, figure in _figures(source, data, image, device):
        path = output / f"{name}.png"
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot make the folder {str(output)!r}: {error.strerror}; set --output") from error
        plots.write_figure(figure, path)
        say(path)


def _figures(source: str, data: str | None, image: str | None, device: str) -> Iterator[tuple[str, Any]]:
    """Yield names and figures of all that can be drawn."""
    history = read_history(Path(source) / "metrics.csv") if os.path.isdir(source) else None
    model = _open(source, device)
    if model is None and (data or image):
        raise ArgumentError(
            f"--data and --image need weights, and {source!r} has no model.safetensors, which the end of a run "
            "writes: leave them out, or give the name of a model"
        )
    if history is not None:
        yield "history", plots.plot_history(history)
    if model is not None:
        yield from plots.model_figures(model, data=data, image=image, progress=progress, report=note)


def _open(source: str, device: str) -> Any:
    """Return the model, or None for a run that has not finished."""
    if os.path.isdir(source):
        finished = (Path(source) / "model.safetensors").exists()
        return open_model(source, device=device) if finished else None
    return open_model(source, device=device)
