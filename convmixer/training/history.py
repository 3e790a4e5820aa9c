"""The course of a run, one row per epoch, as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from convmixer.checkpoints import write_atomically


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
        return (
            f"epoch {self.epoch:3d}  train loss {self.train_loss:.4f} accuracy {self.train_accuracy:5.2f} %  "
            f"validation loss {self.validation_loss:.4f} accuracy {self.validation_accuracy:5.2f} %  "
            f"{self.seconds:.0f} s ({self.images_per_second:.0f} images/s)"
        )


def write_history(path: Path, history: Sequence[Epoch]) -> None:
    """Write all rows to `path`, in place of what was there."""
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, [field.name for field in dataclasses.fields(Epoch)])
    rows.writeheader()
    for row in history:
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
        rows.writerow(rounded)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))
