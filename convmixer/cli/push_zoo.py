"""`convmixer push-zoo`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from convmixer.cli import options
from convmixer.cli.console import Command, note, say
from convmixer.hub.zoo import Zoo, push_zoo


@click.command("push-zoo", cls=Command)
@click.argument("owner")
@click.option("--runs", type=options.PATH, help="Records of the trainings.  [default: docs/runs of the source tree]")
@click.option("--private/--public", default=None, help="Of new repositories.  [default: the owner's setting]")
@click.option("--dry-run", is_flag=True, help="Show what would change, and upload nothing.")
@options.as_json
def push_zoo_command(owner: str, runs: Path | None, private: bool | None, dry_run: bool, as_json: bool) -> None:
    """Publish all weights of this package on the Hugging Face Hub, as OWNER/VARIANT.TAG.

    For those who release the package. Each set of weights gets a repository with its card, evaluation, settings and
    curves, and a collection holds them all. What the Hub has already is left as it is. The token is HF_TOKEN or what
    `hf auth login` stored. At the end stand the fields to paste into convmixer/registry.py.
    """
    zoo = push_zoo(owner, runs=runs, private=private, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(asdict(zoo), indent=2))
    else:
        _show(zoo, dry_run)


def _show(zoo: Zoo, dry_run: bool) -> None:
    would = "would " if dry_run else ""
    for entry in zoo.entries:
        changed = f"{would}commit {', '.join(entry.changed)}" if entry.changed else "unchanged"
        say(f"{entry.hub_id}: {changed}")
        if entry.url:
            say(f"    {entry.url}")
    added = f"{would}add {', '.join(zoo.added)}" if zoo.added else "unchanged"
    say(f"collection {zoo.collection or 'to be made'}: {added}")
    known = [entry for entry in zoo.entries if entry.revision]
    if known:
        say("")
        say("Fields of the records in convmixer/registry.py:")
    for entry in known:
        say("")
        say(f"# {entry.name}")
        for name, value in entry.fields.items():
            say(f"{name}={json.dumps(value)},")
    if dry_run:
        note("dry run: nothing was uploaded")
