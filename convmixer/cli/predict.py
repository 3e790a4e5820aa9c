"""`convmixer predict`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from convmixer.cli import options
from convmixer.cli.console import OUT, Command, complain, note, plain
from convmixer.factory import create_model
from convmixer.inference import FileResult, find_images, predict_files


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True)
@click.option("--model", "name", default="convmixer_256_8.cifar10", show_default=True, help="Any name of create_model.")
@options.checkpoint
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True)
@options.batch_size
@options.draft
@options.device
@options.as_json
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    name: str,
    checkpoint: Path | None,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Classify IMAGES: files, http and https URLs, and folders with all images that they hold.

    The exit status is 1 if an image could not be read; the others are classified all the same.
    """
    paths = find_images(images, report=note)
    model = create_model(name, pretrained=True, device=device, checkpoint=checkpoint)
    results = []
    for result in predict_files(model, paths, **settings):
        if result.error:
            complain(result.error)
        results.append(result)
    if as_json:
        click.echo(json.dumps([_record(result) for result in results], indent=2))
    elif any(not result.error for result in results):
        _show(results)
    if any(result.error for result in results):
        ctx.exit(1)


def _record(result: FileResult) -> dict[str, Any]:
    if result.error:
        return {"image": result.image, "error": str(result.error)}
    predictions = [{"label": label, "probability": probability} for label, probability in result.predictions]
    return {"image": result.image, "predictions": predictions}


def _show(results: Iterable[FileResult]) -> None:
    table = Table("image", "label", "probability", box=None, header_style="bold")
    table.columns[0].overflow = "fold"  # a path that is cut off names no image
    table.columns[2].justify = "right"
    for result in results:
        for i, (label, probability) in enumerate(result.predictions):
            table.add_row(plain(result.image) if i == 0 else "", plain(label), f"{100 * probability:.1f} %")
    OUT.print(table)
