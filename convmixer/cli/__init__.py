"""The command line, with one file per command: it parses, calls one function of the library, and prints.

A command may import any module of the package, and none imports a command. What commands share is in `console` (what
is printed, and how errors are shown) and `options` (options that several commands take). Arguments come in through
click; a `ConvMixerError` of the library goes to standard error, with exit status 2.
"""

import click
import torch

from convmixer.cli.bench import bench
from convmixer.cli.console import Group
from convmixer.cli.convert import convert
from convmixer.cli.demo import demo
from convmixer.cli.export import export
from convmixer.cli.info import info
from convmixer.cli.list import list_command
from convmixer.cli.plot import plot
from convmixer.cli.predict import predict
from convmixer.cli.push import push
from convmixer.cli.push_zoo import push_zoo_command
from convmixer.cli.train import train
from convmixer.cli.validate import validate


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="convmixer")
def main() -> None:
    """ConvMixer models: list them, classify images, train, measure, publish, convert, export, draw, serve a page."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; in Python the flag is the caller's


_COMMANDS = (
    list_command,
    info,
    predict,
    train,
    convert,
    push,
    push_zoo_command,
    validate,
    export,
    plot,
    bench,
    demo,
)

for _command in _COMMANDS:
    main.add_command(_command)
