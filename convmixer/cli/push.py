"""`convmixer push`."""

from __future__ import annotations

from typing import Any

import click

from convmixer.cli.console import Command, say
from convmixer.hub.publish import push_to_hub


@click.command(cls=Command)
@click.argument("source", metavar="RUN_OR_MODEL")
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=VALUE", help="Such as top-1=88.2; again for more.")
@click.option("--test-data", default="", help="What the metrics were measured on.")
@click.option("--licence", default="", help="SPDX identifier such as mit.")
@click.option("--training-data", default="", help="What the model was trained on.")
@click.option("--recipe", default="", help="How it was trained.")
@click.option("--description", default="", help="A few sentences for the top of the card.")
@click.option("--tag", "tags", multiple=True, help="A further tag of the card; may be given again.")
@click.option("--private/--public", default=None, help="Of a new repository.  [default: the owner's setting]")
@click.option("--revision", help="Branch to commit to; created if it does not exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", default="", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and upload nothing.")
def push(source: str, repo_id: str, metrics: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Publish a run or a model on the Hugging Face Hub, as OWNER/NAME.

    RUN_OR_MODEL is the folder of a run of `convmixer train`, which brings metrics, recipe and curves, a .safetensors
    file, or any name of create_model. The token is HF_TOKEN or what `hf auth login` stored.
    """
    values = dict(_metric(text) for text in metrics)
    published = push_to_hub(source, repo_id, metrics=values, dry_run=dry_run, **options)
    for line in published.card.splitlines() if dry_run else ():
        say(line)
    for library, difference in published.differences.items():
        say(f"opened with {library}: logits differ by at most {difference:.1e}")
    for path, size in published.files.items():
        say(f"{size:12,} bytes  {path}")
    say(f"dry run: nothing was uploaded to {repo_id}" if dry_run else published.url)


def _metric(text: str) -> tuple[str, float]:
    """Return the name and the value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(value)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give NAME=VALUE such as top-1=88.2") from error
