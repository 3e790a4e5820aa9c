"""Open a published folder with each library, and compare logits and class names with those of the model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from convmixer.errors import ArgumentError, WeightsError
from convmixer.factory import create_model
from convmixer.inference import known_labels
from convmixer.wrappers import copy_module

TOLERANCE = 1e-4  # of the largest logit


@torch.inference_mode()
def verify(folder: Path, model: nn.Module, labels: Sequence[str] | None) -> dict[str, float]:
    """Open a folder with each library that is installed: convmixer, timm and transformers.

    Args:
        folder: What `save_pretrained` writes, except the card.
        model: The model that was written.
        labels: Its class names.

    Returns:
        The largest difference of a logit, by library, for one random image.

    Raises:
        WeightsError: A library cannot open the folder, or finds other logits or class names.
        ArgumentError: PyTorch's default type, in which the libraries build models, is not float32.
    """
    if torch.get_default_dtype() != torch.float32:
        raise ArgumentError(
            f"PyTorch's default type is {torch.get_default_dtype()}, in which other libraries would open the folder: "
            "call torch.set_default_dtype(torch.float32) first"
        )
    model = copy_module(model).to("cpu", torch.float32).eval()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = config["num_classes"]
    size, generator = config["pretrained_cfg"]["input_size"], torch.Generator().manual_seed(0)
    x = torch.randn(1, *size, generator=generator, dtype=torch.float32, device="cpu")
    expected = model(x)
    differences = {}
    for library, compute in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            continue
        if library == "transformers" and not classes:
            continue  # it has no class for a model without classes
        try:
            logits, names = compute(folder, x)
        except Exception as error:  # each library has its own errors
            reason = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"{library} cannot open what would be published. {reason}. Nothing was uploaded"
            ) from error
        if logits.shape != expected.shape:
            shapes = f"{tuple(logits.shape)}, the model's {tuple(expected.shape)}"
            raise WeightsError(
                f"{library} opens what would be published, but its logits have the shape {shapes}. Nothing was uploaded"
            )
        difference = (logits.float() - expected).abs().max().item()
        if not difference <= TOLERANCE * max(expected.abs().max().item(), 1e-3):
            raise WeightsError(
                f"{library} opens what would be published, but its logits differ by {difference:.2g} from the model's, "
                f"which are up to {expected.abs().max().item():.2g}. Nothing was uploaded"
            )
        if labels and tuple(names or ())[-classes:] != tuple(labels)[-classes:]:
            raise WeightsError(f"{library} reads other class names, {names!r}. Nothing was uploaded")
        differences[library] = difference
    return differences


def with_convmixer(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    model = create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    return model(x), known_labels(model) if model.num_classes else None


def with_timm(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model(x), model.pretrained_cfg.get("label_names")


def with_transformers(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model(x).logits, list(model.config.id2label.values())


LIBRARIES: dict[str, Callable[[Path, Tensor], tuple[Tensor, Sequence[str] | None]]] = {
    "convmixer": with_convmixer,
    "timm": with_timm,
    "transformers": with_transformers,
}
