"""The folder of a run: its lock, its checkpoints and its records, each written whole or not at all.

recipe.json        every field of the recipe
train.log          what was reported, line by line
metrics.csv/.json  one row per epoch
last.pt            all that resuming needs: weights, optimizer, average, place in the epoch
last.safetensors   the weights after the last finished epoch
best.safetensors   those with the lowest validation loss
model.safetensors  the result, and result.json what it reached; written at the end
plots/history.png  loss, accuracy and learning rate by epoch
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.hub.checkpoints import write_atomically
from convmixer.training.recipes import Recipe


class Run:
    """A run folder, what may be written into it, and what resuming needs."""

    def __init__(self, folder: str | Path, recipe: Recipe, *, resume: bool) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.recipe = recipe
        self.state = self.folder / "last.pt"
        self.waiting: list[str] | None = []  # lines of the log, as long as the run may come to nothing
        if self.folder.is_file():
            raise ArgumentError(f"output={str(self.folder)!r} is a file: give a folder")
        if self.state.exists() and not resume:
            raise ArgumentError(f"{str(self.folder)!r} holds a run: resume it (--resume) or choose another folder")
        if resume and not self.state.exists():
            raise ArgumentError(f"nothing to resume: {str(self.state)!r} does not exist")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone."""
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ArgumentError(
                f"another process is training in {str(self.folder)!r}: wait for it or choose another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise ArgumentError(f"cannot use the folder {str(self.folder)!r}: {error}. Choose another") from error
        for leftover in self.folder.glob(".*.*"):  # of a write that was killed
            leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if all(file.name == ".lock" for file in self.folder.iterdir()):  # it came to nothing
                    (self.folder / ".lock").unlink(missing_ok=True)
                    self.folder.rmdir()
            lock.release()

    @contextlib.contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """The path of a file to be written atomically; a full disk is an error that leaves the old file as it was."""
        try:
            (self.folder / name).parent.mkdir(exist_ok=True)
            yield self.folder / name
        except (OSError, SafetensorError) as error:
            reason = error.__cause__ or error  # a WriteError names the file, too
            raise ConvMixerError(
                f"cannot write {str(self.folder / name)!r}: {reason}. What was saved before is whole: "
                "make room and go on with --resume"
            ) from error

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill a file of the run."""
        with self.saving(name) as path:
            write_atomically(path, write)

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def begin(self) -> None:
        """Write the recipe, and the lines that have been logged so far."""
        self.write_json("recipe.json", dataclasses.asdict(self.recipe))
        lines, self.waiting = self.waiting or [], None
        for line in lines:
            self.log(line)

    def log(self, line: str) -> None:
        """Add a line to `train.log`, at the earliest when the run begins."""
        if self.waiting is not None:
            self.waiting.append(line)
            return
        with contextlib.suppress(OSError), (self.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self, **state: Any) -> None:
        """Keep all that resuming needs."""
        state["recipe"] = json.dumps(dataclasses.asdict(self.recipe))

        def write(path: Path) -> None:
            with path.open("wb") as file:  # torch.save given a path turns errors of the disk into RuntimeError
                torch.save(state, file)

        self.write("last.pt", write)

    def load(self) -> dict[str, Any]:
        """What `save` kept, after a check that the recipe is still the same; nothing in the file is executed.

        Raises:
            ArgumentError: Another recipe, or fewer epochs than are done. Another length is no other recipe: the
                schedule goes on at the same epoch of the new length.
            ConvMixerError: A file that cannot be read.
        """
        try:
            state: dict[str, Any] = torch.load(self.state, map_location="cpu", weights_only=True)
            saved = json.loads(state["recipe"])
        except Exception as error:
            raise ConvMixerError(f"cannot resume from {str(self.state)!r}: {error}. Delete it to start anew") from error
        defaults, asked = (json.loads(json.dumps(dataclasses.asdict(recipe))) for recipe in (Recipe(), self.recipe))
        saved = defaults | saved  # fields that are newer than the run
        changed = [
            f"{name} was {saved[name]!r}, is {new!r}"
            for name, new in asked.items()
            if saved[name] != new and name not in ("epochs", "note")
        ]
        if changed:
            raise ArgumentError(f"cannot resume {str(self.state)!r} with another recipe: {'; '.join(changed)}")
        done = len(state["history"]) + (state["place"]["step"] > 0)
        if self.recipe.epochs < done:
            raise ArgumentError(f"{str(self.state)!r} has {done} epochs begun: give epochs of at least that")
        return state
