"""Loss and accuracy of a model over a split, without augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from convmixer.data.memory import ImageSet
from convmixer.errors import ArgumentError, DataError
from convmixer.inference import class_logits, count_classes
from convmixer.model import evaluation_view
from convmixer.tracing import computing
from convmixer.training.precision import autocast
from convmixer.transforms import normalization, preprocessing
from convmixer.wrappers import find_model

T = TypeVar("T")
Progress = Callable[..., Iterable[Any]]


def no_progress(items: Iterable[T], _description: str = "") -> Iterable[T]:
    """Show nothing."""
    return items


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 64,  # larger activations are mapped again for every batch on a CPU
    precision: str = "float32",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Measure loss and top-1 accuracy over a split, without augmentation; the model may be in wrappers.

    Returns:
        `{"loss": mean cross entropy, "top1": percent, "count": images}`; loss and top1 are NaN if an answer is.

    Raises:
        ArgumentError: Another kind of model or fewer classes, or a precision that the device does not compute.
        DataError: A stream of images of which none can be read.

    Example:
        >>> from convmixer.data.memory import load_images
        >>> from convmixer.training import evaluate
        >>> images = load_images("data/flowers", "test", (3, 32, 32), report=lambda line: None)
        >>> model = convmixer.create_model("convmixer_256_8", num_classes=2, device="cpu")
        >>> evaluate(model, images)["count"]
        6
    """
    model = find_model(model)
    if len(images.classes) > count_classes(model):
        raise ArgumentError(f"images of {len(images.classes)} classes for a model of {count_classes(model)}")
    parameter = next(model.parameters())
    device = parameter.device
    normalize = normalization(preprocessing(model))
    loss = torch.zeros((), dtype=torch.float32, device=device)
    correct = torch.zeros((), dtype=torch.float32, device=device)
    seen = 0
    view = evaluation_view(model)
    for pixels, labels in progress(images.in_order(batch_size), "validating"):
        with computing(), autocast(device, precision):
            logits = class_logits(view(normalize(pixels.to(device)).to(parameter.dtype)).float())
        labels = labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    if len(images) and not seen:
        raise DataError(f"none of the {len(images):,} images to validate on could be read")
    count = seen or math.nan  # no images, no figures
    mean = loss.item() / count
    return {"loss": mean, "top1": math.nan if math.isnan(mean) else 100 * correct.item() / count, "count": seen}
