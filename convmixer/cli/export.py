"""`convmixer export`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from convmixer.cli import options
from convmixer.cli.console import Command, say
from convmixer.errors import ArgumentError
from convmixer.factory import extractor, open_model
from convmixer.hub.publish import save_pretrained
from convmixer.runtime.export import FORMATS, OPSET, export_model


@click.command(cls=Command)
@click.argument("source")
@click.option("--format", "format_", type=click.Choice([*FORMATS, "hub"]), required=True)
@click.option("--output", type=options.PATH, help="File or, for hub, folder.  [default: named after SOURCE]")
@options.checkpoint
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights.",
)
@click.option("--fold/--no-fold", default=None, help="Fold every BatchNorm.  [default: where the format computes]")
@click.option("--normalization", is_flag=True, help="Take images in [0, 1]: fold mean and std, too.")
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels of a side.  [default: the model's]")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open, as the batch always is.")
@click.option("--opset", type=click.IntRange(min=OPSET), help=f"Of ONNX's operators.  [default: {OPSET}]")
@click.option(
    "--features", "blocks", multiple=True, type=int, help="Return the output of this block; again for more blocks."
)
def export(
    source: str,
    format_: str,
    output: Path | None,
    checkpoint: Path | None,
    dtype: str,
    blocks: tuple[int, ...],
    **further: Any,
) -> None:
    """Write the model SOURCE for another program, and check the file by that program.

    SOURCE is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file. The format hub
    is a folder as `convmixer push` publishes it.
    """
    if format_ == "hub":
        if any(value not in (None, False) for value in further.values()) or blocks or dtype != "float32":
            raise ArgumentError("a hub folder holds the model as it is: leave out --dtype, sizes, and what folds")
        _export_hub_folder(source, output or Path(f"{_stem(source)}-hub"), checkpoint)
        return
    opened = open_model(source, checkpoint=checkpoint, device="cpu")
    model = extractor(opened, blocks) if blocks else opened
    if output is None:
        middle = ("-features" if blocks else "") + ("" if dtype == "float32" else f".{dtype}")
        output = Path(_stem(source) + middle + FORMATS[format_].suffix)
    _check_not_overwritten(output, (Path(source), Path(source) / "model.safetensors", checkpoint))
    result = export_model(model, output, format_, dtype=getattr(torch, dtype), **further)
    folded = ", folded" if result.folded else ""
    checked = f"within {result.difference:.1e} of the model's"
    if math.isnan(result.difference):
        checked = "checked by their specification: this system cannot run them"
    say(f"{output}: {format_}, {dtype}{folded}, {' and '.join(result.outputs)} {checked}")


def _stem(source: str) -> str:
    """Return what a file of SOURCE is called by default, without its suffix."""
    name = Path(source).resolve().name if os.path.isdir(source) else Path(source).name.removesuffix(".safetensors")
    return re.sub(r"[^\w.-]+", "_", name)


def _export_hub_folder(source: str, folder: Path, checkpoint: Path | None) -> None:
    save_pretrained(open_model(source, checkpoint=checkpoint, device="cpu") if checkpoint else source, folder)
    say(f"{folder}: for create_model, timm and transformers as local-dir:{folder}")


def _check_not_overwritten(output: Path, inputs: Sequence[Path | None]) -> None:
    """Raise an ArgumentError if the output is one of the files that are exported."""
    for file in inputs:
        if file and os.path.isfile(file) and output.exists() and output.samefile(file):
            raise ArgumentError(f"{str(output)!r} is the file that is exported: set another --output")
