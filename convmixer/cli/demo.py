"""`convmixer demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from convmixer.cli import options
from convmixer.cli.console import Command, say
from convmixer.demo.server import HOST, PORT, serve
from convmixer.demo.space import write_space
from convmixer.errors import ArgumentError
from convmixer.runtime.choose import BACKENDS


@click.command(cls=Command)
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--host", default=HOST, show_default=True, help="Address to listen on; 0.0.0.0 lets other machines in.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes any that is free."
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS[1:]),
    help="Backend to time; repeatable.  [default: all but compile, which compiles for minutes]",
)
@options.device
@click.option(
    "--space",
    type=options.PATH,
    metavar="FOLDER",
    help="Write the files of a Hugging Face Space for one MODEL to an empty folder, and serve nothing.",
)
@click.pass_context
def demo(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    backends: tuple[str, ...],
    space: Path | None,
    **further: Any,
) -> None:
    """Serve a page to try models in a browser.

    MODEL is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file. Without any,
    the page offers the weights that ship with the package. Pictures stay on the machine that serves the page.
    """
    if space is None:
        serve(models, backends=backends or None, report=say, **further)
        return
    for name in ("host", "port", "backends", "device"):
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = "backend" if name == "backends" else name
            raise ArgumentError(f"--space writes files and serves nothing: leave out --{option}")
    if len(models) > 1:
        raise ArgumentError(f"--space is for one model, not for {len(models)}: {', '.join(models)}")
    folder = write_space(space, *models)
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        say(f"{path.stat().st_size:12,} bytes  {path}")
    create = "hf repos create OWNER/NAME --type space --sdk gradio"
    say(f"Publish it: {create} && hf upload OWNER/NAME {folder} --type space")
