"""The folder of a run: its lock, its checkpoints and its records, each written whole or not at all.

recipe.json        every field of the recipe
train.log          what was reported, line by line
metrics.csv/.json  one row per epoch
last.pt            all that resuming needs: weights, optimizer, average, steps of the epoch; it is written first
last.safetensors   the weights after the last finished epoch
best.safetensors   those with the lowest validation loss, by more than min_delta
model.safetensors  the result, and result.json what it reached; written at the end
plots/history.png  loss, accuracy and learning rate by epoch
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.files import remove_leftovers, write_atomically
from convmixer.hub.checkpoints import save_weights
from convmixer.model import ConvMixer
from convmixer.plots import plot_history, write_figure
from convmixer.training.history import Epoch, best_epoch, write_history
from convmixer.training.recipe import Recipe

# What `write_atomically` writes here.
_FILES = (
    *("recipe.json", "metrics.csv", "metrics.json", "last.pt", "last.safetensors", "best.safetensors"),
    *("model.safetensors", "result.json", "plots/history.png"),
)


class RunFolder:
    """The folder of a run: what may be written into it, and what resuming needs.

    Args:
        path: The folder, which need not exist; `~` at its start is expanded.
        recipe: What is trained.
        resume: Whether a run in the folder is to go on.

    Raises:
        ArgumentError: The folder holds a run that is not to be resumed, none that could be, or weights of no run.
    """

    def __init__(self, path: str | Path, recipe: Recipe, *, resume: bool) -> None:
        self.path = Path(os.path.expanduser(path))
        self.recipe, self.resume = recipe, resume
        self.state_file = self.path / "last.pt"
        self.weights = self.path / "model.safetensors"
        self.best_weights = self.path / "best.safetensors"
        self.pending: list[str] | None = []  # lines of the log, as long as the run may come to nothing
        if self.path.is_file():
            raise ArgumentError(f"output={str(self.path)!r} is a file: give a folder")
        if self.state_file.exists() and not resume:
            raise ArgumentError(f"{str(self.path)!r} holds a run: resume it (--resume) or choose another folder")
        others = [name for name in _FILES if (self.path / name).exists()]
        if others and not self.state_file.exists() and self._is_published():
            raise ArgumentError(
                f"{str(self.path)!r} holds a {others[0]} that is not of a run, and the run would replace it: "
                "choose another folder"
            )
        self.holds_old_run = bool(others) and not self.state_file.exists()
        if resume and not self.state_file.exists():
            raise ArgumentError(f"nothing to resume: {str(self.state_file)!r} does not exist")

    def _is_published(self) -> bool:
        """Return whether the files in the folder came from elsewhere, such as from `save_pretrained`."""
        return (self.path / "config.json").exists() or not (self.path / "recipe.json").exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no other process trains in it."""
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ArgumentError(
                f"another process is training in {str(self.path)!r}: wait for it or choose another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise ArgumentError(f"cannot use the folder {str(self.path)!r}: {error}. Choose another") from error
        for name in _FILES:
            remove_leftovers((self.path / name).parent, Path(name).name)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if all(file.name == ".lock" for file in self.path.iterdir()):  # it came to nothing
                    (self.path / ".lock").unlink(missing_ok=True)
                    self.path.rmdir()
            lock.release()

    @contextlib.contextmanager
    def saving(self, name: str) -> Iterator[Path]:
        """Give the path of a file that the block writes atomically.

        Raises:
            ConvMixerError: The disk is full, or takes no files; the old file is as it was.
        """
        try:
            (self.path / name).parent.mkdir(exist_ok=True)
            yield self.path / name
        except OSError as error:
            reason = error.__cause__ or error  # a WriteError names the file, too
            raise ConvMixerError(
                f"cannot write {str(self.path / name)!r}: {reason}. What was saved before is intact: "
                "make room and go on with --resume"
            ) from error

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of the run: `write` fills the path it is given."""
        with self.saving(name) as path:
            write_atomically(path, write)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of JSON."""
        self.write(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def write_weights(self, name: str, model: ConvMixer, metadata: dict[str, Any]) -> None:
        """Write the weights of a model, with what the header of the file says."""
        with self.saving(name) as path:
            save_weights(model, path, metadata)

    def begin(self) -> None:
        """Write the recipe, and the lines that have been logged so far.

        What is of other weights, or of a run before, goes; but `model.safetensors` stays until the run replaces it.
        """
        for name in ("result.json",) if self.resume else _FILES:
            if name != self.weights.name and (self.path / name).exists():
                with self.saving(name) as path:
                    path.unlink()
        self.write_json("recipe.json", dataclasses.asdict(self.recipe))
        lines, self.pending = self.pending or [], None
        for line in lines:
            self.log(line)

    def log(self, line: str) -> None:
        """Add a line to `train.log`, or keep it until the run begins."""
        if self.pending is not None:
            self.pending.append(line)
            return
        how: Any = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may hold what is not UTF-8
        with contextlib.suppress(OSError), (self.path / "train.log").open("a", **how) as file:
            file.write(line + "\n")

    def record_epoch(self, history: Sequence[Epoch], model: ConvMixer, metadata: dict[str, Any]) -> None:
        """Write what a finished epoch adds, after the state for resuming: its files can be written again from that."""
        self.write_weights("last.safetensors", model, metadata)
        if best_epoch(history, self.recipe.min_delta) == history[-1].epoch:
            self.write_weights(self.best_weights.name, model, metadata)
        with self.saving("metrics.csv") as path:
            write_history(path, history)
        rows = [dataclasses.asdict(row) for row in history]
        self.write_json("metrics.json", [{k: None if v != v else v for k, v in row.items()} for row in rows])  # no NaN

    def draw(self, history: Sequence[Epoch]) -> None:
        """Draw the curves."""
        with self.saving("plots/history.png") as path:
            write_figure(plot_history(history), path)

    def save(self, **state: Any) -> None:
        """Save all that resuming needs."""
        state["recipe"] = json.dumps(dataclasses.asdict(self.recipe))

        def write(path: Path) -> None:
            with path.open("wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # it cannot close its archive either, which hides why
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from None
                    raise

        self.write("last.pt", write)

    def load(self) -> dict[str, Any]:
        """Return what `save` wrote, if the recipe is still the same; nothing in the file is executed.

        Raises:
            ArgumentError: Another recipe, or fewer epochs than are done. Another length is not another recipe: the
                schedule goes on at the same epoch of the new length.
            ConvMixerError: A file that cannot be read.
        """
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
            saved = json.loads(state["recipe"])
        except Exception as error:
            raise ConvMixerError(
                f"cannot resume from {str(self.state_file)!r}: {error}. Delete it to start again"
            ) from error
        defaults, asked = (json.loads(json.dumps(dataclasses.asdict(recipe))) for recipe in (Recipe(), self.recipe))
        saved = defaults | saved  # fields that are newer than the run
        changed = [
            f"{name} was {saved[name]!r}, is {new!r}"
            for name, new in asked.items()
            if saved[name] != new and name not in ("epochs", "note")
        ]
        if changed:
            raise ArgumentError(f"cannot resume {str(self.state_file)!r} with another recipe: {'; '.join(changed)}")
        done = len(state["history"]) + (state["place"]["step"] > 0)
        if self.recipe.epochs < done:
            raise ArgumentError(f"{str(self.state_file)!r} has {done} epochs begun: give epochs of at least that")
        return state
