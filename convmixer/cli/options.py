"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from convmixer.training.precision import PRECISIONS

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

data = click.option("--data", required=True, help="Folder, .tar, table of labels, or a name such as torch/cifar10.")
labels = click.option(
    "--labels", help="A .csv, .tsv or .parquet file with the columns image and label, instead of class folders."
)
data_root = click.option("--data-root", type=PATH, help="Where downloaded data sets lie.")
download = click.option("--download", is_flag=True, help="Let torch/ data sets download.")
draft = click.option(
    "--draft/--no-draft",
    default=True,
    show_default=True,
    help="Decode large JPEG photographs at a reduced scale, which is faster.",
)
checkpoint = click.option("--checkpoint", type=PATH, help="A .safetensors file to load instead of its weights.")
batch_size = click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
device = click.option("--device", default="auto", show_default=True)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def precision(default: str) -> Callable[[F], F]:
    """Return the option `--precision`, with its default."""
    return click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), default=default, show_default=True)
