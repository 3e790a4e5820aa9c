"""Publish the zoo: a repository on the Hub for each set of weights that ships, and a collection of them.

Weights come from the package. Settings, history and evaluation of the training come from `docs/runs` of the source
tree; the curves are drawn from the history.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convmixer import plots, registry
from convmixer.errors import ArgumentError, DataError, HubError, WeightsError, list_first
from convmixer.hub import client, publish
from convmixer.hub.card import BEGIN, eval_results
from convmixer.hub.publishable import HUB_DATASETS, Publishable, gather
from convmixer.registry import Weights
from convmixer.training.history import read_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "ConvMixer"
DESCRIPTION = "ConvMixer models with their weights, metrics, recipes and curves, for convmixer, timm and transformers"
SOURCE_TREE = Path(__file__).parents[2] / "docs" / "runs"
# What describes a run: of `convmixer train`, or of another program.
RUN_FILES = (("recipe.json", "metrics.csv", "evaluation.json"), ("job.json", "losses.csv", "evaluation.json"))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One set of weights on the Hub: what its record in the registry is to say, and what was done.

    Attributes:
        name: `variant.tag`.
        hub_id: "owner/name".
        revision: The commit that holds the files; None in a dry run that would make another one.
        sha256: Of the weights.
        size: Of the weights in bytes.
        changed: Paths of the files that the Hub did not have, or not with this content; empty if nothing was done.
        url: Address of the commit, or "" if there is none.
    """

    name: str
    hub_id: str
    revision: str | None
    sha256: str
    size: int
    changed: tuple[str, ...]
    url: str

    @property
    def fields(self) -> dict[str, str | int | None]:
        """The fields of the record in the registry."""
        return {"hub_id": self.hub_id, "revision": self.revision, "sha256": self.sha256, "size": self.size}


@dataclasses.dataclass(frozen=True)
class Zoo:
    """What `push_zoo` published, or with `dry_run` would have.

    Attributes:
        entries: One for each set of weights.
        collection: Address of the collection; "" if a dry run finds none.
        added: Repositories that the collection did not have.
    """

    entries: tuple[Entry, ...]
    collection: str
    added: tuple[str, ...]


def push_zoo(
    owner: str,
    *,
    runs: str | Path | None = None,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Zoo:
    """Publish all weights that ship with the package, each as `owner/variant.tag`, and collect them.

    Each repository gets the package's file as it is, so that the registry's sha256 holds for both, config.json, a card
    with code for each library, the evaluation in `.eval_results`, and what is known of the training. All of it is
    written and opened, and all repositories are read, before the first of them changes. What the Hub has already is
    left as it is: a second call commits nothing, and a call after a failure finishes the rest.

    Args:
        owner: User or organization on the Hub.
        runs: Folder with a folder `variant.tag` for each training; by default `docs/runs` of the source tree, which is
            not in a wheel.
        private: Whether new repositories and a new collection are private. By default repositories are as the owner has
            set it, and a collection is public.
        token: Access token; by default HF_TOKEN or what `hf auth login` stored.
        dry_run: Do everything except create and upload.

    Raises:
        ArgumentError: No such folder of runs, or an owner that the Hub cannot have.
        DataError: The folder lacks a file of a training.
        WeightsError: This installation has no weights, or a library computes other logits with what would be published.
        HubError: The Hub cannot be reached or refuses, or a repository of that name holds something else. It is safe to
            run the same again.
        DependencyError: matplotlib, which draws the curves, is missing.
    """
    shipped = {f"{v.name}.{w.tag}": w for v in registry.VARIANTS for w in v.weights if w.path}
    if not shipped:
        raise WeightsError(f"no weights in {str(registry.WEIGHTS_FOLDER)!r}: install a package that has them")
    folder = _runs_folder(runs)
    for name in shipped:
        publish.check_repo_id(f"{owner}/{name}")
    with tempfile.TemporaryDirectory(prefix="convmixer-", ignore_cleanup_errors=True) as temporary:
        drafts = [_draft(name, w, f"{owner}/{name}", folder, Path(temporary) / name) for name, w in shipped.items()]
        plans = [_compare(draft, token) for draft in drafts]
        entries = _publish(plans, private, dry_run)
    hub_ids = [entry.hub_id for entry in entries]
    url, added = client.collect(owner, TITLE, DESCRIPTION, hub_ids, private=bool(private), token=token, dry_run=dry_run)
    return Zoo(tuple(entries), url, tuple(added))


@dataclasses.dataclass(frozen=True)
class _Draft:
    """One repository as it is to be, in a folder; its card is written when that of the Hub is known."""

    name: str
    weights: Weights
    hub_id: str
    source: Publishable
    paths: dict[str, Path]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A draft, the repository as it is, and the paths of the files that differ."""

    draft: _Draft
    branch: client.Branch
    changed: tuple[str, ...]


def _draft(name: str, weights: Weights, hub_id: str, runs: Path, folder: Path) -> _Draft:
    """Write all files of a repository except the card, and open them with each library."""
    extra = _files_of_run(runs / name, name)
    if dataset := HUB_DATASETS.get(weights.labels):
        extra[f".eval_results/{weights.labels}.yaml"] = eval_results(weights.metrics[0], dataset, hub_id)
    source = dataclasses.replace(gather(name, (), "", "", "", "", "", (), None), extra=extra)
    folder.mkdir()
    files, _ = publish.stage(source, folder)
    return _Draft(name, weights, hub_id, source, {path: folder / path for path in [*files, "README.md"]})


def _compare(draft: _Draft, token: str | None) -> _Plan:
    """Look at the repository, and write the card with what others wrote into it."""
    branch = client.read_branch(draft.hub_id, token=token)
    _check_ours(branch, draft.name)
    publish.add_card(draft.source, branch, draft.paths["README.md"].parent)
    return _Plan(draft, branch, tuple(sorted(branch.changed(draft.paths))))


def _check_ours(branch: client.Branch, name: str) -> None:
    """Refuse a repository that holds something other than these weights; an empty one will do."""
    others = sorted(path for path in branch.hashes if path != ".gitattributes")
    if not others:
        return
    config = client.read_json(branch, "config.json")
    found = config.get("architecture") if isinstance(config, dict) else None
    if BEGIN not in branch.card or found != name.partition(".")[0]:
        raise HubError(
            f"hf-hub:{branch.repo_id} exists and holds something other than {name} ({list_first(others)}). Nothing "
            "was changed: rename or delete that repository, or give another owner"
        )


def _publish(plans: Sequence[_Plan], private: bool | None, dry_run: bool) -> list[Entry]:
    entries: list[Entry] = []
    for plan in plans:
        draft, done = plan.draft, client.head(plan.branch)
        if plan.changed:
            try:
                done = None if dry_run else _commit(plan, private)
            except HubError as error:
                raise HubError(
                    f"{error}. {len(entries)} of {len(plans)} repositories are as they should be; the same command "
                    "finishes the rest"
                ) from error
        revision, url = (done.sha, done.url) if done else (None, "")
        fields = (draft.weights.sha256, draft.weights.size, plan.changed)
        entries.append(Entry(draft.name, draft.hub_id, revision, *fields, url))
    return entries


def _commit(plan: _Plan, private: bool | None) -> client.Commit:
    branch = client.ensure_branch(plan.branch, private=private, create_pr=False)
    return client.commit(branch, plan.draft.paths, publish.default_message(plan.draft.hub_id))


# ---- what is known of a training ------------------------------------------------------------------------------------


def _runs_folder(given: str | Path | None) -> Path:
    folder = Path(os.path.expanduser(given)) if given else SOURCE_TREE
    if not folder.is_dir():
        hint = f"{str(folder)!r} is not a folder" if given else "the records of the trainings are not in the wheel"
        raise ArgumentError(f"{hint}: give runs= (--runs) the folder docs/runs of convmixer's source tree")
    return folder


def _files_of_run(folder: Path, name: str) -> dict[str, bytes]:
    """Return the files that describe a training, and its curves, by their paths in the repository."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    complete = [files for files in RUN_FILES if present.issuperset(files)]
    if not complete:
        wanted = " or ".join(", ".join(files) for files in RUN_FILES)
        raise DataError(f"{str(folder)!r} does not describe the training of {name}: it needs {wanted}")
    content = {path: (folder / path).read_bytes() for path in complete[0]}
    with tempfile.TemporaryDirectory(prefix="convmixer-") as temporary:
        picture = Path(temporary) / "history.png"
        plots.write_figure(curves(folder), picture)
        content["plots/history.png"] = picture.read_bytes()
    return content


def curves(folder: Path) -> Figure:
    """Draw the history of a training by epoch: metrics.csv of `convmixer train`, else another program's losses.csv."""
    if (folder / "metrics.csv").is_file():
        return plots.plot_history(read_history(folder / "metrics.csv"))
    return plots.plot_losses(read_losses(folder))


def read_losses(folder: Path) -> list[dict[str, float]]:
    """Read losses.csv of a training by another program: a row for each epoch, by column."""
    with (folder / "losses.csv").open(newline="", encoding="utf-8") as file:
        return [{title: float(value) for title, value in row.items()} for row in csv.DictReader(file)]
