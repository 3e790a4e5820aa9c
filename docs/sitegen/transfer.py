"""What benchmarks/transfer.py found: tables, and which runs the figure and the pictures show."""

from __future__ import annotations

import statistics
from typing import Any

from sitegen.records import record, table
from sitegen.runs import mean
from sitegen.speed import result

PICTURES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt")  # docs/images/clothing: the first of each kind


def shown() -> dict[str, dict[str, Any]]:
    """The runs whose answers are shown, by way: the first seed, at the smallest size."""
    runs = result("transfer")["runs"]
    smallest = min(run["size"] for run in runs)
    return {run["way"]: run for run in runs if run["size"] == smallest and run["seed"] == 0}


def digits(text: str) -> list[int]:
    return [int(digit) for digit in text]


@record("transfer")
def _accuracy() -> str:
    runs = result("transfer")["runs"]
    rows = []
    for size, way in dict.fromkeys((run["size"], run["way"]) for run in runs):
        same = [run for run in runs if (run["size"], run["way"]) == (size, way)]
        minutes = statistics.mean(run["train_seconds"] for run in same) / 60
        scores = (mean([run[key] for run in same], 1) for key in ("test_accuracy", "validation_accuracy"))
        rows.append((f"{size} px", way, *scores, f"{minutes:.0f} min"))
    return table(("images", "what learns", "top-1, test", "top-1, validation", "time"), rows, numbers=3)


@record("transfer-pictures")
def _pictures() -> str:
    found = result("transfer")
    classes, labels = found["classes"], digits(found["labels"])
    rows = []
    for kind in PICTURES:
        first = labels.index(classes.index(kind))
        answers = (classes[digits(run["predicted"])[first]] for run in shown().values())
        rows.append((f"![A photograph of the kind {kind}](images/clothing/{kind}.jpg)", kind, *answers))
    return table(("photograph", "kind", *shown()), rows)
