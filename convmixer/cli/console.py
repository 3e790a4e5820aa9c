"""What commands print, and how: on two consoles, as plain text, with errors that are not tracebacks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from convmixer.errors import ConvMixerError

T = TypeVar("T")
OUT = Console(highlight=False, emoji=False)
ERR = Console(stderr=True, highlight=False, emoji=False)


class Command(click.Command):
    """A command that expands `~` at the start of an argument or of an option's value, where a shell may not."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        def expand(argument: str) -> str:
            option, value = re.fullmatch(r"(--[\w-]+=)?(.*)", argument, re.DOTALL).groups("")  # type: ignore[union-attr]
            return option + os.path.expanduser(value)

        return super().parse_args(ctx, [expand(argument) for argument in args])


class Group(click.Group):
    """The commands: an error of the library is one line on standard error, and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _escaped_output():
                return super().invoke(ctx)
        except ConvMixerError as error:
            complain(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            complain(f"cannot write {error.filename or 'the output'}: {error.strerror}")
        ctx.exit(2)


@contextlib.contextmanager
def _escaped_output() -> Iterator[None]:
    """Escape what the console's encoding lacks, within the block; Python would raise an error."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def plain(text: object) -> str:
    """Return text that a terminal shows as it is: no markup, no control sequences, nothing that its encoding lacks."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return escape(shown.encode(OUT.encoding, "backslashreplace").decode(OUT.encoding))  # tables know their width


def say(text: object) -> None:
    """Print a line."""
    OUT.print(plain(text), soft_wrap=True)


def note(text: object) -> None:
    """Print a line on standard error, where standard output is for programs."""
    ERR.print(plain(text), soft_wrap=True)


def complain(error: object) -> None:
    """Print an error."""
    ERR.print(f"[red]error:[/red] {plain(error)}", soft_wrap=True)


def progress(items: Iterable[T], description: str = "") -> Iterator[T]:
    """Show a progress bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        yield from bar.track(items, description=description)


class _Speed(TextColumn):
    """Images per second of what was done since the bar began."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")


@contextlib.contextmanager
def counting(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar of images on standard error, if that is a terminal; yield what sets (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(""), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
