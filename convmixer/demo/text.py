"""The texts of the page, in Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from convmixer.demo.classifier import BackendTime, Classifier
from convmixer.hub.card import literal
from convmixer.inference import Prediction
from convmixer.transforms import preprocessing

FEW_CLASSES = 20  # at most so many are named


def bars_by_label(predictions: Prediction) -> dict[str, float]:
    """Return probabilities by label; classes that share a name, such as the two cranes of ImageNet, are numbered."""
    bars: dict[str, float] = {}
    for label, probability in predictions:
        name, number = label, 1
        while name in bars:
            number += 1
            name = f"{label} ({number})"
        bars[name] = probability
    return bars


def describe(classifier: Classifier) -> str:
    """Describe a model: its size, that of its images, and its classes."""
    parameters = sum(p.numel() for p in classifier.model.parameters())
    height, width = preprocessing(classifier.model)["input_size"][1:]
    count = len(classifier.labels)
    text = f"{parameters / 1e6:.2f} M parameters. It sees {width}x{height} pixels and knows {count:,} classes"
    if count <= FEW_CLASSES:
        text += f": {html.escape(', '.join(map(literal, classifier.labels)))}"
    return f"{text}. It answers with one of them, whatever the picture shows."


def table_of_times(name: str, rows: Sequence[BackendTime], waiting: Sequence[str]) -> str:
    """Return a table of all backends: the times of those that have been timed, and the others.

    Args:
        name: Name of the model.
        rows: The times so far.
        waiting: The other backends; the first one is being timed.
    """
    fastest = min((row.milliseconds for row in rows if row.milliseconds is not None), default=None)
    lines = [f"Time for one image, `{name}`", "", "| backend | milliseconds | |", "| --- | --: | --- |"]
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"| {row.backend} | | {_cell(row.failure)} |")
        else:
            note = "fastest" if row.milliseconds == fastest and not waiting else ""
            lines.append(f"| {row.backend} | {row.milliseconds:.2f} | {note} |")
    lines += [f"| {backend} | | {'waiting' if i else 'being timed'} |" for i, backend in enumerate(waiting)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text for a cell of a table, in one line and without a bar, which would end the cell."""
    return html.escape(" ".join(text.split())).replace("|", "/")
