"""What a folder of predictions was computed from: only the same source, model and settings resume a run in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from convmixer.errors import ArgumentError, DataError, WriteError, brief
from convmixer.files import write_atomically
from convmixer.hub.checkpoints import digest
from convmixer.registry import PREPROCESSING
from convmixer.transforms import preprocessing

NAME = "_manifest.json"  # readers of Parquet folders skip names that begin with _ or .
_LOCK = ".lock"
_FORMAT = 1

Record = Mapping[str, Mapping[str, Any]]  # sections "source", "model" and "settings", each with values by name


def describe_model(model: nn.Module, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what identifies a model: its name, and a digest of its weights, layers, preprocessing and labels."""
    config = preprocessing(model)
    tag = config.get("tag")
    layers = sorted({type(module).__name__ for module in model.modules()})
    identity = [digest(model), layers, [config[key] for key in PREPROCESSING], labels]
    name = f"{config.get('architecture')}{f'.{tag}' if tag else ''}"
    return {"name": name, "digest": hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()}


def claim(output: Path, record: Record) -> None:
    """Write the manifest of a new run into a folder, or check that the existing one is the same.

    Raises:
        ArgumentError: The folder holds another run; nothing in it is changed.
        DataError: The manifest cannot be read.
        WriteError: The folder takes no files.
    """
    file = output / NAME
    record = {"format": {"version": _FORMAT}, **record}
    if file.exists():
        _check_same(output, _read(file), json.loads(json.dumps(record)))
        return
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def reserve(output: Path) -> Iterator[None]:
    """Create the folder if it does not exist, and keep other runs out of it within the block.

    Raises:
        ArgumentError: It is a file, cannot be created or holds something else, or another run is writing into it.
        WriteError: It takes no files.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"cannot make the folder {str(output)!r}: {error.strerror}; give another output") from error
    _check_ours(output)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ArgumentError(f"another run is writing into {str(output)!r}: wait for it, or stop it") from error
    except OSError as error:
        raise WriteError(
            f"cannot write into {str(output)!r}: {error.strerror or error}. Give another output"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_ours(output: Path) -> None:
    """Raise ArgumentError if a folder holds files and no manifest."""
    others = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith("."))
    if others and not (output / NAME).exists():
        raise ArgumentError(
            f"{str(output)!r} is not empty and has no {NAME}: it holds {brief(others[0])}"
            + (f" and {len(others) - 1} more" if len(others) > 1 else "")
            + ". Give a new folder, or that of a run to resume"
        )


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Read a manifest; raise DataError if the file cannot be read or is not one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
            raise ValueError("not an object of objects")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(file)!r}: {error}. Give another output") from error
    return found


def _check_same(output: Path, written: Record, given: Record) -> None:
    """Raise ArgumentError that says how the record of this run differs from the one in the folder."""
    differences = []
    for section in sorted(written.keys() | given.keys()):
        old, new = written.get(section, {}), given.get(section, {})
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        differences += [f"{section} {key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed]
    if differences:
        raise ArgumentError(
            f"{os.fspath(output)!r} holds the rows of another run: {'; '.join(differences)}. To resume it, give what "
            "it had; for a new run, give another output"
        )
