"""`convmixer list`."""

from __future__ import annotations

import json

import click
from rich.table import Table

from convmixer.cli import options
from convmixer.cli.console import OUT, Command, say
from convmixer.registry import list_models, model_info


@click.command("list", cls=Command)
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only models that have weights.")
@options.as_json
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the models whose name matches PATTERN."""
    variants = [model_info(name) for name in list_models(pattern, pretrained=pretrained)]
    if as_json:
        click.echo(json.dumps([variant.record() for variant in variants], indent=2))
        return
    if not variants:
        say(f"no model matches {pattern!r}")
    table = Table(box=None, header_style="bold")
    for title in ("model", "input", "params", "MACs", "weights", "top-1"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("params", "MACs", "top-1") else "left")
    for v in variants:
        tags = "\n".join(f"{w.tag} ({'package' if w.path else 'Hub'})" for w in v.weights)
        top1 = "\n".join(f"{w.metrics[0].value:.2f}" for w in v.weights)
        table.add_row(v.name, f"{v.input_size[1]}", f"{v.parameters / 1e6:.2f} M", f"{v.macs / 1e9:.2f} G", tags, top1)
    OUT.print(table)
