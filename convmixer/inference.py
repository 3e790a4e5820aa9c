"""Classify images: files, PIL images and arrays of any common kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ImageError
from convmixer.model import evaluation_view
from convmixer.tracing import computing
from convmixer.transforms import create_transform
from convmixer.wrappers import find_model, in_channels

Prediction = list[tuple[str, float]]


def read_image(source: Any, channels: int = 3) -> Image.Image:
    """An upright 8-bit RGB image (grey for `channels=1`) from a path, a PIL image or an array.

    EXIF rotation is applied, transparency is laid on white, 16-bit values are scaled down.

    Args:
        source: A path; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or
            floats in [0, 1]; a tensor of the same, or channels-first.
        channels: 1 or 3.

    Raises:
        ImageError: It cannot be read.
    """
    if channels not in (1, 3):
        raise ArgumentError(f"images have 1 or 3 channels, this model takes {channels}: call it with tensors instead")
    if isinstance(source, str | Path):
        try:
            with Image.open(os.path.expanduser(source)) as file:
                image = ImageOps.exif_transpose(file)
                image.load()
        except FileNotFoundError as error:
            raise ImageError(f"no image at {str(source)!r}") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{str(source)!r} is not an image that Pillow can read") from error
        except Exception as error:  # each of Pillow's plugins has its own
            raise ImageError(f"cannot read {str(source)!r}: {error}") from error
    elif isinstance(source, Image.Image):
        try:
            image = ImageOps.exif_transpose(source)
        except Exception as error:  # Pillow reads pixels late
            raise ImageError(f"cannot read {source!r}: {error}") from error
    else:
        image = _from_array(source)
    if 0 in image.size:
        raise ImageError(f"image of {image.width}x{image.height} pixels: there is nothing to classify")
    return _to_8_bit(image).convert("L" if channels == 1 else "RGB")


def _from_array(source: Any) -> Image.Image:
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16
    else:
        try:
            array = np.asarray(source)
        except ValueError as error:
            raise ImageError(f"{type(source).__name__} that is no array: {error}") from error
    if isinstance(source, torch.Tensor) and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or 0 in array.shape:
        raise ImageError(f"array of shape {array.shape}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"float array with values from {array.min()} to {array.max()}: give values in [0, 1]")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"array of {array.dtype}: give uint8, uint16, bool, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey opens as I or I;16; F has no fixed range
        values = np.asarray(image, dtype=np.float64)
        most = 65535.0 if values.max() > 255 or image.mode != "F" else 255.0 if values.max() > 1 else 1.0
        return Image.fromarray(np.clip(np.round(values / most * 255), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


@lru_cache(maxsize=1)
def imagenet_labels() -> tuple[str, ...]:
    """ImageNet-1k's classes in words, in the order of the weights."""
    from timm.data import ImageNetInfo  # reads its tables when it is constructed

    info = ImageNetInfo()
    return tuple(info.index_to_description(i) for i in range(1000))


def count_classes(model: nn.Module) -> int:
    """How many classes a model tells apart: by one output two, else one for each. An ArgumentError without a head."""
    outputs: int = getattr(model, "num_classes", 0)
    if not outputs:
        raise ArgumentError("this model has no classes: build it without features_only and with num_classes above 0")
    return max(outputs, 2)


def class_logits(logits: Tensor) -> Tensor:
    """Logits (B, N) of all classes. One output z counts as two, -z/2 and z/2, whose softmax is the sigmoid of z."""
    return torch.cat([-logits, logits], 1) / 2 if logits.shape[1] == 1 else logits


def known_labels(model: nn.Module) -> tuple[str, ...] | None:
    """The model's class names by index; None where nothing says what they are. An ArgumentError without a head.

    A model with one output has two classes, and its `label_names` name both, or the second alone, whose probability is
    the sigmoid of the output: from "cat" follow "not cat" and "cat".
    """
    count = count_classes(model)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    if names and len(names) == model.num_classes == 1:
        names = (f"not {names[0]}", names[0])
    if names and len(names) == count:
        return tuple(str(name) for name in names)
    if count == 1000 and str(config.get("tag") or "").startswith("in1k"):
        return imagenet_labels()
    return None


def label_names(model: nn.Module) -> tuple[str, ...]:
    """The model's class names by index; "class 0", ... where nothing says what they are."""
    return known_labels(model) or tuple(f"class {i}" for i in range(count_classes(model)))


@overload
def predict(model: nn.Module, images: list[Any], topk: int = ..., *, batch_size: int = ...) -> list[Prediction]: ...


@overload
def predict(model: nn.Module, images: Any, topk: int = ..., *, batch_size: int = ...) -> Prediction: ...


@torch.inference_mode()
def predict(model: nn.Module, images: Any, topk: int = 5, *, batch_size: int = 64) -> Prediction | list[Prediction]:
    """The most probable classes of one image or many.

    Args:
        model: A classifier from `create_model`, in any mode, which stays as it is. It is computed in evaluation mode,
            eagerly where it was compiled. Many threads may share it. Also one inside `torch.compile`, DataParallel,
            DistributedDataParallel, torch's AveragedModel or timm's ModelEma: the model inside is computed.
        images: Whatever `read_image` takes, or a list (or tuple) of it.
        topk: How many classes to return, at most all of them.
        batch_size: Images computed at a time.

    Returns:
        `[(label, probability), ...]`, most probable first; for a list of images a list of these. A model with one
        output has two classes: see `known_labels`.

    Raises:
        ImageError: An image that cannot be read.
        ArgumentError: A model without a head, another kind of module, or a topk below 1.
    """
    many = isinstance(images, list | tuple)
    model = find_model(model)
    names = label_names(model)
    for argument, value in {"topk": topk, "batch_size": batch_size}.items():
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{argument}={value!r}: give a whole number of at least 1")
    sources: Sequence[Any] = images if many else [images]
    parameter = next(model.parameters())
    transform = create_transform(model)
    channels = in_channels(model)
    predictions: list[Prediction] = []
    view = evaluation_view(model)
    for start in range(0, len(sources), batch_size):
        batch = torch.stack([transform(read_image(s, channels)) for s in sources[start : start + batch_size]])
        with computing():
            logits = class_logits(view(batch.to(parameter.device, parameter.dtype)).float())
            values, indices = logits.softmax(1).topk(min(topk, len(names)))
        for row, probabilities in zip(indices.tolist(), values.tolist(), strict=True):
            predictions.append([(names[i], p) for i, p in zip(row, probabilities, strict=True)])
    return predictions if many else predictions[0]
