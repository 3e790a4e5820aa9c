"""`convmixer validate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from convmixer.cli import options
from convmixer.cli.console import OUT, Command, note, plain, progress, say
from convmixer.errors import ArgumentError
from convmixer.evaluation import ClassAccuracy, Evaluation, compare
from convmixer.files import check_writable, write_atomically
from convmixer.runtime.choose import BACKENDS


@click.command(cls=Command)
@click.argument("model")
@options.data
@options.labels
@options.checkpoint
@click.option(
    "--split", default="test", show_default=True, help="train, validation or test; of hfds/ data any that there is."
)
@click.option("--flip", is_flag=True, help="Also score with flip test-time augmentation.")
@options.draft
@options.batch_size
@options.device
@options.precision("float32")
@options.data_root
@options.download
@click.option("--backend", type=click.Choice(BACKENDS), help="Also measure the optimized model, in this backend.")
@click.option("--int8", is_flag=True, help="Optimize to int8; needs --backend and --calibration.")
@click.option("--calibration", help="Training images for --int8: folder, .tar, or a name such as torch/cifar10.")
@click.option("--output", type=options.PATH, help="A file to write the JSON to.")
@options.as_json
def validate(
    model: str,
    data: str,
    backend: str | None,
    int8: bool,
    calibration: str | None,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure MODEL on labelled images: accuracy, loss, calibration, accuracy per class.

    MODEL is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file. With --backend
    it is measured twice: as it is, and optimized.
    """
    if backend is None and (int8 or calibration):
        raise ArgumentError("--int8 and --calibration are for the optimized model: add --backend auto")
    if output:
        check_writable(output)
    settings |= {"backend": backend, "int8": int8, "calibration": calibration}
    found = compare(model, data, progress=progress, report=note if as_json else say, **settings)
    text = json.dumps(found.record(), indent=2)
    if output:
        write_atomically(output, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if as_json:
        click.echo(text)
        return
    _show(found.original)
    if found.optimized is not None:
        OUT.print()
        say(f"optimized ({found.choice})")
        _show(found.optimized)
        say(f"top-1 changed by {found.optimized.top1 - found.original.top1:+.2f} points")


def _show(result: Evaluation) -> None:
    table = Table(box=None, show_header=result.flip is not None, header_style="bold")
    table.add_column("", style="bold", no_wrap=True)
    columns = [result] if result.flip is None else [result, result.flip]
    for title in ("images as they are", "with mirror images")[: len(columns)]:
        table.add_column(title, justify="right")
    table.add_row("top-1", *(f"{s.top1:.2f} %" for s in columns))
    table.add_row("top-5", *(f"{s.top5:.2f} %" for s in columns))
    table.add_row("loss", *(f"{s.loss:.4f}" for s in columns))
    table.add_row("calibration error", *(f"{s.calibration_error:.2f} %" for s in columns))
    table.add_row("images", f"{result.count:,}")
    table.add_row("images per second", f"{result.images_per_second:,.0f}")
    OUT.print(table)
    _show_classes(result.classes)


def _show_classes(classes: Sequence[ClassAccuracy]) -> None:
    """Print all classes if they are few, and else the worst."""
    many = len(classes) > 20
    shown = sorted(classes, key=lambda c: c.top1)[:10] if many else classes
    table = Table(f"worst 10 of {len(classes)} classes" if many else "class", "top-1", "images", box=None)
    table.header_style = "bold"
    table.columns[0].overflow = "fold"  # of two long names the starts may be equal
    for column in table.columns[1:]:
        column.justify = "right"
    for row in shown:
        table.add_row(plain(row.label), f"{row.top1:.2f} %", f"{row.count:,}")
    OUT.print()
    OUT.print(table)
