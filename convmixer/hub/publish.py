"""Publish a model: one folder that convmixer, timm and transformers open, and one commit of it to the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.hub import client
from convmixer.hub.card import write_card
from convmixer.hub.checkpoints import check_keys, read_tensors, save_weights
from convmixer.hub.publishable import Publishable, gather
from convmixer.hub.verify import verify
from convmixer.hub.write_config import config_of, rebuild
from convmixer.registry import HUB_FILE, Metric


@dataclass(frozen=True)
class Publication:
    """What `push_to_hub` published, or with `dry_run` would have.

    Attributes:
        repo_id: "owner/name".
        files: Bytes of each file, by its path in the repository.
        card: Text of README.md.
        differences: Largest difference of a logit, by library in which the folder was opened.
        url: Address of the commit or of the pull request; None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    differences: dict[str, float]
    url: str | None


def save_pretrained(
    model: nn.Module | str | Path,
    directory: str | Path,
    *,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    test_data: str = "",
    licence: str = "",
    training_data: str = "",
    recipe: str = "",
    description: str = "",
    tags: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    repo_id: str = "",
) -> Path:
    """Write a folder that convmixer, timm and transformers open: model.safetensors, config.json, README.md.

    Sizes, activation, head, channels, preprocessing and class names are those of the model. Layout and wrappers do not
    matter: channels_last, `torch.compile`, DataParallel, DistributedDataParallel, torch's AveragedModel and timm's
    ModelEma are undone. Dropout rates, which only training needs, are left out. Files are put in place when all of them
    are written and the weights have been read back. Other files of the folder stay, and so does the text of its
    README.md outside the generated part.

    Args:
        model: A ConvMixer of this package or of timm; the folder of a finished run of `convmixer train`, whose recipe,
            results and curves then go into the folder; a .safetensors file; or any name of `create_model`.
        directory: Folder to write; made if it does not exist.
        metrics: In percent: `{"top-1": 88.2}` on `test_data`, or `Metric` records for more than one test set. Those of
            a run or of registered weights are known.
        test_data: What the figures of a mapping were measured on.
        licence: SPDX identifier, such as "mit". It has no default, but that of weights with a name is known.
        training_data: What the model was trained on.
        recipe: How.
        description: A few sentences for the top of the card.
        tags: Further tags of the card.
        label_names: Class names by index; the model's own if None.
        repo_id: "owner/name" on the Hub that the card's examples load from; by default they load from `directory`, of
            an absolute path only its name, because the card may be published.

    Returns:
        The folder.

    Raises:
        ArgumentError: Not a ConvMixer, one without preprocessing, or a value that makes no sense.
        WeightsError: Weights that are not finite or do not fit the architecture.
        ConvMixerError: The folder cannot be written. What was in it before is unchanged; if that is not so, as where a
            file cannot be replaced once others were, the text says so, and nothing opens the folder.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True)
        >>> folder = convmixer.save_pretrained(model, "photos", licence="mit", metrics={"top-1": 88.2})
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    folder = Path(os.path.expanduser(directory))
    source = gather(model, metrics, test_data, licence, training_data, recipe, description, tags, label_names)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ArgumentError(f"directory={str(folder)!r} is a file: give a folder")
    if os.path.exists(folder / "last.pt"):
        raise ArgumentError(
            f"directory={str(folder)!r} is the folder of a run, whose model.safetensors would be replaced: give another"
        )
    if repo_id:
        check_repo_id(repo_id)
    existed = os.path.exists(folder)
    with _writing(folder):
        old = folder / "README.md"
        card = old.read_text(encoding="utf-8-sig") if old.is_file() else ""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Inside the folder, which may be a file system of its own: files then move into place without copying.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
                staging = Path(temporary)
                files = _write(source, staging)
                text = _card_of_folder(source, folder, repo_id, card)
                (staging / "README.md").write_text(text, encoding="utf-8", newline="\n")
                _put(staging, folder, [*sorted(set(files) - {"config.json"}), "README.md", "config.json"])
        except BaseException:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _put(staging: Path, folder: Path, paths: Sequence[str]) -> None:
    """Move files into a folder, the last one being config.json, without which nothing opens the folder.

    While others move, it has none: the old one would open a mixture of two models.
    """
    for target in [folder / path for path in paths]:
        if target.is_dir():
            raise ArgumentError(f"cannot write {str(target)!r}: it is a folder. Nothing was changed")
        target.parent.mkdir(exist_ok=True)
    config, old = folder / "config.json", staging / "old"
    if config.exists():
        config.replace(old)
    moved = False
    try:
        for path in paths:
            (staging / path).replace(folder / path)
            moved = True
    except BaseException as error:
        if not moved and old.exists():
            old.replace(config)
        if not moved or not isinstance(error, OSError):
            raise
        raise ConvMixerError(
            f"cannot write all of {str(folder)!r}: {error}. It has no config.json now, so that nothing opens what is "
            "new in part: make room, and save again"
        ) from error


def _card_of_folder(source: Publishable, folder: Path, repo_id: str, old: str) -> str:
    """Return the card, whose examples load from the Hub if there is a `repo_id`, else from the folder."""
    if repo_id:
        return write_card(source, repo_id.partition("/")[2], f"hf-hub:{repo_id}", repo_id, old)
    name = folder.resolve().name
    path = name if folder.is_absolute() else str(folder)
    return write_card(source, name, f"local-dir:{path}", path, old)


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    test_data: str = "",
    licence: str = "",
    training_data: str = "",
    recipe: str = "",
    description: str = "",
    tags: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "",
    dry_run: bool = False,
) -> Publication:
    """Publish a model on the Hugging Face Hub: the folder of `save_pretrained`, as one commit.

    Before anything is uploaded, the folder is opened with convmixer, with timm, and with transformers if it is
    installed; the logits must be those of the model and the class names the same. Text that somebody wrote into the
    card outside the generated part is kept. If others commit at the same time, nothing of theirs is overwritten.

    Args:
        model: As for `save_pretrained`, and so are `metrics`, `test_data`, `licence`, `training_data`, `recipe`,
            `description`, `tags` and `label_names`.
        repo_id: "owner/name"; the repository is created if it does not exist.
        metrics: See above.
        test_data: See above.
        licence: See above.
        training_data: See above.
        recipe: See above.
        description: See above.
        tags: See above.
        label_names: See above.
        private: Whether a new repository is private; by default as the owner has set it on the Hub.
        revision: Branch to commit to, created if it does not exist; by default the main one.
        create_pr: Open a pull request instead of committing.
        token: Access token; by default HF_TOKEN or what `hf auth login` stored. It is never printed nor written.
        message: Of the commit.
        dry_run: Do everything except create and upload.

    Raises:
        ArgumentError: As for `save_pretrained`, or a `repo_id` that is not "owner/name".
        WeightsError: A library opens the folder, but computes other logits.
        HubError: The Hub cannot be reached or refuses. It is safe to run the same again.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True)
        >>> sorted(convmixer.push_to_hub(model, "me/photos", licence="mit", dry_run=True).files)
        ['README.md', 'config.json', 'model.safetensors']
    """
    check_repo_id(repo_id)
    source = gather(model, metrics, test_data, licence, training_data, recipe, description, tags, label_names)
    with tempfile.TemporaryDirectory(prefix="convmixer-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        files, differences = stage(source, folder)
        branch = client.read_branch(repo_id, revision=revision, token=token)
        if not dry_run:
            branch = client.ensure_branch(branch, private=private, create_pr=create_pr)
        card = add_card(source, branch, folder)
        paths = {path: folder / path for path in [*files, "README.md"]}
        sizes = {path: file.stat().st_size for path, file in sorted(paths.items())}
        subject = message or default_message(repo_id)
        url = None if dry_run else client.commit(branch, paths, subject, create_pr=create_pr).url
    return Publication(repo_id, sizes, card, differences, url)


def default_message(repo_id: str) -> str:
    """Return the message of a commit to a repository."""
    return f"{repo_id.partition('/')[2]}, written by convmixer"


def stage(source: Publishable, folder: Path) -> tuple[list[str], dict[str, float]]:
    """Write all files except the card, and open the folder with each library.

    Returns:
        The paths of the files, and the largest difference of a logit by library.

    Raises:
        WeightsError: A library opens the folder, but computes other logits.
        ConvMixerError: The folder cannot be written.
    """
    with _writing(folder):
        files = _write(source, folder)
    return files, verify(folder, source.model, source.labels)


def add_card(source: Publishable, branch: client.Branch, folder: Path) -> str:
    """Write README.md for a branch, with what others wrote into its card; return the text."""
    card = _card_of_folder(source, folder, branch.repo_id, branch.card)
    with _writing(folder):
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return card


def check_repo_id(repo_id: str) -> None:
    """Raise an ArgumentError for what is not "owner/name"."""
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ArgumentError(f"repo_id={repo_id!r}: give owner/name, of letters, digits, '-', '_' and '.'")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise ConvMixerError(
            f"cannot write {str(folder)!r}: {error.__cause__ or error}. What it held before is unchanged: make room, "
            "or choose another folder"
        ) from error


def _write(source: Publishable, folder: Path) -> list[str]:
    """Write all files except the card; return their paths."""
    config = config_of(source.model, source.labels, source.licence)
    expected = rebuild(source.model).state_dict()
    check_keys(source.model.state_dict(), expected, f"this {type(source.model).__name__}")
    if source.file:
        shutil.copyfile(source.file, folder / HUB_FILE)
    else:  # without metadata equal weights make equal files, which the Hub takes once
        save_weights(source.model, folder / HUB_FILE)
    read_tensors(folder / HUB_FILE)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    for path, content in source.extra.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    return [HUB_FILE, "config.json", *source.extra]
