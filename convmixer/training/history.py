"""The history of a run: one row per epoch, and its CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from convmixer.errors import DataError
from convmixer.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Means over one epoch. Accuracies are percent top-1, of augmented images in training; seconds are wall time."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        scores = [("train", self.train_loss, self.train_accuracy)]
        if not math.isnan(self.validation_accuracy):  # there are validation images
            scores.append(("validation", self.validation_loss, self.validation_accuracy))
        shown = [f"{name} loss {loss:.4f} accuracy {top1:5.2f} %" for name, loss, top1 in scores]
        speed = f"{self.seconds:.0f} s ({self.images_per_second:.0f} images/s)"
        return "  ".join([f"epoch {self.epoch:3d}", *shown, speed])


def best_epoch(history: Sequence[Epoch], min_delta: float) -> int:
    """Return the number of the epoch with the lowest validation loss, or 0 if there is none.

    A later epoch is better only if its loss is lower by more than `min_delta`.
    """
    best, lowest = 0, math.inf
    for row in history:
        if row.validation_loss < lowest - min_delta:
            best, lowest = row.epoch, row.validation_loss
    return best


def write_history(path: str | Path, history: Sequence[Epoch]) -> None:
    """Write all rows as CSV to `path`, to six decimals and rates to six digits, and replace what was there.

    Raises:
        ArgumentError: There is no such folder, or `path` is one.
        WriteError: The folder takes no files, or the disk is full.

    Example:
        >>> from convmixer.training.history import Epoch, write_history
        >>> write_history("metrics.csv", [Epoch(1, 0.01, 2.0, 25.0, 1.8, 30.0, 60.0, 750.0)])
    """
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, [field.name for field in dataclasses.fields(Epoch)])
    rows.writeheader()
    for row in history:
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
        rows.writerow(rounded | {"learning_rate": float(f"{row.learning_rate:.6g}")})  # it may be tiny
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))


def read_history(path: str | Path) -> list[Epoch]:
    """Return the rows that `write_history` wrote, to six decimals.

    Raises:
        DataError: There is no such file, or it is another kind of file.

    Example:
        >>> from convmixer.training.history import Epoch, read_history, write_history
        >>> write_history("metrics.csv", [Epoch(1, 0.01, 2.0, 25.0, 1.8, 30.0, 60.0, 750.0)])
        >>> read_history("metrics.csv")[0].validation_accuracy
        30.0
    """
    path, names = Path(os.path.expanduser(path)), [field.name for field in dataclasses.fields(Epoch)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line]
        if not lines or lines[0] != names:
            raise ValueError(f"its first line is not {','.join(names)}")
        if uneven := [line for line in lines if len(line) != len(names)]:
            raise ValueError(f"the row {','.join(uneven[0])!r} has {len(uneven[0])} values, not {len(names)}")
        return [Epoch(int(line[0]), *map(float, line[1:])) for line in lines[1:]]
    except FileNotFoundError as error:
        raise DataError(f"no history at {str(path)!r}: give the metrics.csv of a run of convmixer train") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{str(path)!r} is not a history of a run: {error}. Give the metrics.csv that convmixer train wrote"
        ) from error
