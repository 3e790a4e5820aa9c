"""The preprocessing that belongs to a model or its weights, built by timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from timm.data import create_transform as timm_create_transform
from timm.data import resolve_data_config
from torch import Tensor, nn

from convmixer.errors import ArgumentError, is_count, nearest
from convmixer.registry import CROP_MODES, INTERPOLATIONS, PREPROCESSING, get_variant
from convmixer.wrappers import in_channels, unwrap

if TYPE_CHECKING:
    from torchvision.transforms import v2


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return the model's pretrained_cfg, with one mean and one std for each channel that it takes.

    Raises:
        ArgumentError: It has none, or one that says too little.
    """
    found = getattr(unwrap(model), "pretrained_cfg", None)
    if not found:
        raise ArgumentError(
            f"this {type(unwrap(model)).__name__} says nothing about its preprocessing: build it with "
            "convmixer.create_model, or pass a registry name"
        )
    if missing := [name for name in ("mean", "std") if found.get(name) is None]:
        raise ArgumentError(
            f"the pretrained_cfg of this {type(unwrap(model)).__name__} does not say how images are prepared: add "
            f"{', '.join(missing)}, or build the model with convmixer.create_model"
        )
    config = dict(found)
    channels = in_channels(model)
    if config.get("input_size"):
        config["input_size"] = (channels, *config["input_size"][1:])
    if channels != len(config["mean"]):
        # The first convolution was adapted to other channels: each gets the mean of the old statistics.
        for name in ("mean", "std"):
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def normalization(config: dict[str, Any]) -> v2.Transform:
    """Build a transform of uint8 (..., C, H, W) to float32, normalised by the mean and std of a configuration."""
    from torchvision.transforms import v2  # a third of the time that importing this package takes

    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])])


def create_transform(
    model_or_name: nn.Module | str, is_training: bool = False, **overrides: Any
) -> Callable[[PIL.Image.Image], Tensor]:
    """Build the transform from a PIL image to the normalised tensor (C, H, W) that a model takes.

    Args:
        model_or_name: A model from `create_model`, or a registry name with or without a tag.
        is_training: timm's training augmentation instead of resize and centre crop.
        **overrides: `input_size`, `interpolation`, `mean`, `std`, `crop_pct`, `crop_mode`, and any further argument of
            `timm.data.create_transform`, such as `auto_augment` or `re_prob`.

    Raises:
        UnknownModelError: No such name.
        ArgumentError: An override that timm does not have, or a model without preprocessing.

    Example:
        >>> transform = convmixer.create_transform("convmixer_256_8")
        >>> transform(PIL.Image.open("cat.png").convert("RGB")).shape
        torch.Size([3, 32, 32])
    """
    if isinstance(model_or_name, str):
        variant, _ = get_variant(model_or_name)
        config = variant.preprocessing
    else:
        config = preprocessing(model_or_name)
    valid = set(inspect.signature(timm_create_transform).parameters) - {"is_training"} | set(PREPROCESSING)
    for name in overrides:
        if name not in valid:
            raise ArgumentError(f"unknown argument {name!r} of create_transform; {nearest(name, valid)}")
    _check(overrides, config)
    data_config = resolve_data_config({k: overrides[k] for k in PREPROCESSING if k in overrides}, config)
    further = {k: v for k, v in overrides.items() if k not in PREPROCESSING}
    transform: Callable[[PIL.Image.Image], Tensor] = timm_create_transform(
        **data_config, **further, is_training=is_training
    )
    return transform


def _check(overrides: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise an ArgumentError for values that timm checks by assertions, late, or not at all."""
    size = overrides.get("input_size", config.get("input_size"))
    if not (isinstance(size, tuple | list) and len(size) == 3 and all(map(is_count, size))):
        raise ArgumentError(f"input_size={size!r}: give (channels, height, width)")
    for name in ("mean", "std"):
        value = overrides.get(name, config[name])
        numbers = isinstance(value, tuple | list) and all(isinstance(v, Real) for v in value)
        if not (numbers and len(value) in (1, size[0])):
            raise ArgumentError(f"{name}={value!r}: give one number per channel, {size[0]} of them")
    if overrides.get("crop_mode", "center") not in CROP_MODES:
        raise ArgumentError(f"crop_mode={overrides['crop_mode']!r}; valid: {', '.join(CROP_MODES)}")
    part = overrides.get("crop_pct", 1)
    if not (isinstance(part, Real) and 0 < float(part) <= 1):
        raise ArgumentError(f"crop_pct={part!r}: give a part of the image in (0, 1]")
    if overrides.get("interpolation", "bicubic") not in INTERPOLATIONS:
        raise ArgumentError(f"interpolation={overrides['interpolation']!r}; valid: {', '.join(INTERPOLATIONS)}")
