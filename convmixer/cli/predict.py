"""`convmixer predict`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from convmixer.batch.dataset import Summary, predict_dataset
from convmixer.cli import options
from convmixer.cli.console import OUT, Command, complain, counting, note, plain, say
from convmixer.errors import ArgumentError
from convmixer.factory import open_model
from convmixer.inference import FileResult, find_images, predict_files
from convmixer.runtime.choose import BACKENDS


@click.command(cls=Command)
@click.argument("images", nargs=-1)
@click.option(
    "--model",
    "name",
    default="convmixer_256_8.cifar10",
    show_default=True,
    help="Any name of create_model, the folder of a run, or a .safetensors file.",
)
@options.checkpoint
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True)
@options.batch_size
@options.draft
@options.device
@options.as_json
@click.option("--data", help="All images of a folder, .tar, .parquet, wds/, hfds/ or torch/, into files in --output.")
@click.option("--output", type=options.PATH, help="Folder for the .parquet files of --data.")
@click.option("--split", help="A split of --data.  [default: all images, or the only split]")
@click.option("--embed", is_flag=True, help="Write embeddings instead of labels.")
@click.option("--rows-per-file", type=click.IntRange(min=1), help="[default: 10000]")
@click.option("--backend", type=click.Choice(BACKENDS), help="[default: auto]")
@click.option("--precision", type=click.Choice(("auto", "float32", "bfloat16", "float16")), help="[default: float32]")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode.  [default: one per core]")
@click.option("--ray", is_flag=False, flag_value="", metavar="[ADDRESS]", help="Compute on Ray, on many machines.")
@click.option(
    "--actors", type=click.IntRange(min=1), help="Number of Ray actors.  [default: one per GPU, or per machine]"
)
@click.option("--image-column", help="Of Parquet files.  [default: the one with bytes]")
@click.option("--key-column", help="Of Parquet files: names the images.  [default: key, path, file_name or id]")
@options.data_root
@options.download
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    name: str,
    checkpoint: Path | None,
    topk: int,
    batch_size: int,
    draft: bool,
    device: str,
    as_json: bool,
    data: str | None,
    output: Path | None,
    **of_data: Any,
) -> None:
    """Classify IMAGES: files, http and https URLs, and folders with all images that they hold.

    The exit status is 1 if an image could not be read; the others are classified all the same.

    With --data and --output instead of IMAGES, a data set of any size is classified or embedded. Its rows go into
    Parquet files, where a broken image is a row with its error. The same command continues an interrupted run.
    """
    given = {key: value for key, value in of_data.items() if value is not None and value is not False}
    common: dict[str, Any] = {"topk": topk, "batch_size": batch_size, "draft": draft}
    if data is None:
        if output is not None or given:
            option = "output" if output is not None else next(iter(given))
            raise ArgumentError(f"--{option.replace('_', '-')} is for data sets: add --data SOURCE and --output FOLDER")
        if not images:
            raise click.MissingParameter(ctx=ctx, param=next(p for p in ctx.command.params if p.name == "images"))
        if not _classify(images, name, checkpoint, device, as_json, **common):
            ctx.exit(1)
        return
    if images or output is None:
        missing = "--data needs --output FOLDER, which takes the rows" if output is None else ""
        raise ArgumentError(missing or f"give --data or images, not both: {images[0]!r} is an image or a folder")
    if "ray" in given:
        device = "cpu" if device == "auto" else device  # actors have the devices that Ray gives to them
    model = open_model(name, checkpoint=checkpoint, device=device)
    given |= {"dtype": given.pop("precision", "float32")}
    if "ray" in given:
        given["ray"] = given["ray"] or True
    with counting("embedding" if "embed" in given else "classifying") as progress:
        summary = predict_dataset(model, data, output, progress=progress, report=note, **common, **given)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(summary), "images_per_second": summary.images_per_second}))
    else:
        _summarize(summary, output)


def _classify(
    images: tuple[str, ...], name: str, checkpoint: Path | None, device: str, as_json: bool, **settings: Any
) -> bool:
    """Print what single images show; return whether all of them could be read."""
    paths = find_images(images, report=note)
    model = open_model(name, checkpoint=checkpoint, device=device)
    results = []
    for result in predict_files(model, paths, **settings):
        if result.error:
            complain(result.error)
        results.append(result)
    if as_json:
        click.echo(json.dumps([_record(result) for result in results], indent=2))
    elif any(not result.error for result in results):
        _show(results)
    return not any(result.error for result in results)


def _summarize(summary: Summary, output: Path) -> None:
    files = f"{summary.files:,} file{'' if summary.files == 1 else 's'}"
    broken = f", of which {summary.errors:,} could not be read (column error)" if summary.errors else ""
    say(f"{summary.images:,} images{broken}, in {files} of {output}")
    if summary.images > summary.kept:
        count = f"{summary.images - summary.kept:,} of them" if summary.kept else "it"
        say(f"{count} took {summary.seconds:,.1f} s, {summary.images_per_second:,.0f} images/s; {summary.choice}")


def _record(result: FileResult) -> dict[str, Any]:
    if result.error:
        return {"image": result.image, "error": str(result.error)}
    predictions = [{"label": label, "probability": probability} for label, probability in result.predictions]
    return {"image": result.image, "predictions": predictions}


def _show(results: Iterable[FileResult]) -> None:
    table = Table("image", "label", "probability", box=None, header_style="bold")
    for column in table.columns[:2]:
        column.overflow = "fold"  # a path that is cut off names no image, and a class no class
    table.columns[2].justify = "right"
    for result in results:
        for i, (label, probability) in enumerate(result.predictions):
            table.add_row(plain(result.image) if i == 0 else "", plain(label), f"{100 * probability:.1f} %")
    OUT.print(table)
