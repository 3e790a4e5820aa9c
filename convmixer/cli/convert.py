"""`convmixer convert`."""

from __future__ import annotations

from pathlib import Path

import click

from convmixer.cli import options
from convmixer.cli.console import Command, say
from convmixer.factory import create_model
from convmixer.hub.convert import convert_checkpoint


@click.command(cls=Command)
@click.argument("source", type=options.PATH)
@click.argument("destination", type=options.PATH)
@click.option("--variant", help="The variant that it must be.  [default: recognised from the shapes]")
@click.option("--act-layer", help="Of a folder: the activation.  [default: the variant's, or gelu for other sizes]")
def convert(source: Path, destination: Path, variant: str | None, act_layer: str | None) -> None:
    """Turn the checkpoint SOURCE of another program into DESTINATION.

    DESTINATION is a file that ends in .safetensors, for a variant of the registry; or a folder with a config.json, for
    any size.
    """
    name = convert_checkpoint(source, destination, variant=variant, act_layer=act_layer)
    say(f"{destination}: {name}")
    if name.startswith("local-dir:"):
        model = create_model(name, device="meta")
        config, act = model.pretrained_cfg, type(model.stem[1]).__name__
        size = "x".join(map(str, config["input_size"][1:]))
        say(
            f"The model has the activation {act}, and the preprocessing of {config['architecture']} for {size} pixels "
            f"unless the source says another: correct {destination / 'config.json'} if that is wrong"
        )
