"""`convmixer info`."""

from __future__ import annotations

import json

import click
from rich.table import Table

from convmixer.cli import options
from convmixer.cli.console import OUT, Command, plain
from convmixer.registry import Variant, Weights, model_info


@click.command(cls=Command)
@click.argument("name")
@options.as_json
def info(name: str, as_json: bool) -> None:
    """Show all that is known about the model NAME."""
    variant = model_info(name)
    if as_json:
        click.echo(json.dumps(variant.record(), indent=2))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = _variant_rows(variant)
    for weights in variant.weights:
        rows += [("", ""), *_weights_rows(variant, weights)]
    for title, value in rows:
        table.add_row(title, plain(value))
    OUT.print(table)


def _variant_rows(variant: Variant) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("model", variant.name),
        ("dim / depth", f"{variant.dim} / {variant.depth}"),
        ("kernel / patch", f"{variant.kernel_size} / {variant.patch_size}"),
        ("activation", variant.act_layer),
        ("parameters", f"{variant.parameters:,}"),
        ("MACs", f"{variant.macs:,}"),
        ("input", "x".join(map(str, variant.input_size))),
        ("mean, std", f"{variant.mean}, {variant.std}"),
        ("resize", f"{variant.interpolation}, {variant.crop_mode}, crop {variant.crop_pct}"),
        ("classes", variant.num_classes),
    ]
    return rows + ([("note", variant.note)] if variant.note else [])


def _weights_rows(variant: Variant, weights: Weights) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("weights", f"{variant.name}.{weights.tag}"),
        ("source", weights.source),
        ("licence", weights.licence),
        ("sha256", weights.sha256 or "unknown"),
        ("size", f"{weights.size:,} bytes" if weights.size else "unknown"),
        ("trained on", weights.training_data),
        ("recipe", weights.recipe),
    ]
    if weights.machine:
        rows += [("trained by", weights.machine), ("time", f"{weights.training_seconds:,.0f} s")]
        rows += [("seed", weights.seed)]
    return rows + [(m.name, f"{m.value:.2f} % {m.dataset} ({m.measured_by})") for m in weights.metrics]
