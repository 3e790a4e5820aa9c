"""The architecture of a live model, read off its layers, and the config.json that builds it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer.errors import ArgumentError, WeightsError
from convmixer.hub.config import PREPROCESSING_CHECKS, check_values
from convmixer.model import ACTIVATIONS, ConvMixer, activation, plain
from convmixer.registry import VARIANTS, Variant
from convmixer.transforms import preprocessing

_GEOMETRY = ("stride", "dilation", "padding_mode")
_ACTIVATION_SETTINGS = ("approximate", "negative_slope", "alpha", "min_val", "max_val")


def num_classes(model: Any) -> int:
    """Return the number of outputs by the head itself, which may have been replaced by hand; 0 without a head."""
    if isinstance(model.head, nn.Linear):
        return model.head.out_features
    if isinstance(model.head, nn.Identity):
        return 0
    raise ArgumentError(f"the head is a {type(model.head).__name__}: only a Linear can be built again from config.json")


def shape_of(model: Any) -> dict[str, int | str]:
    """Return the constructor's arguments that define the architecture, read off the layers."""
    stem, depthwise = model.stem[0], model.blocks[0][0].fn[0]
    return {
        "dim": stem.out_channels,
        "depth": len(model.blocks),
        "kernel_size": depthwise.kernel_size[0],
        "patch_size": stem.kernel_size[0],
        "act_layer": _activation_name(model.stem[1]),
    }


def _activation_name(module: nn.Module) -> str:
    kind = type(module)
    for name in ACTIVATIONS:
        known = activation(name)
        # timm has classes with the name and function of some of PyTorch's.
        if kind is known or (kind.__module__.startswith("torch.nn.") and kind.__name__ == known.__name__):
            return name
    raise ArgumentError(
        f"the activation {kind.__name__} has no name that a config.json could give; valid: {', '.join(ACTIVATIONS)}"
    )


def rebuild(model: Any) -> ConvMixer:
    """Build the same architecture without storage.

    Raises:
        ArgumentError: A layer has settings that a config.json does not hold, so that no one could build it again.
    """
    arguments: dict[str, Any] = shape_of(model)
    pool = model.global_pool.pool_type
    arguments |= {"in_chans": model.stem[0].in_channels, "num_classes": num_classes(model), "global_pool": pool}
    built = ConvMixer(**arguments, device="meta")
    layers = dict(model.named_modules())
    for name, layer in built.named_modules():
        if name in layers:
            _check_settings(name, layers[name], layer)
    return built


def _check_settings(name: str, layer: Any, built: nn.Module) -> None:
    """Raise an ArgumentError if a layer computes otherwise than the one that was built, with the same tensors."""
    advice = ""
    if re.fullmatch(r"stem\.1|blocks\.\d+\.(0\.fn\.1|2)", name):
        found, described = ({"activation": _activation_name(act)} | _numbers(act) for act in (layer, built))
    elif isinstance(built, nn.Conv2d):
        found, described = (
            {n: getattr(conv, n, None) for n in _GEOMETRY} | {"padding": _padding(conv)} for conv in (layer, built)
        )
    elif isinstance(built, nn.BatchNorm2d):
        found, described = ({"eps": getattr(norm, "eps", None)} for norm in (layer, built))
        advice = f". Add eps - {built.eps:g} to its running_var, and set eps to {built.eps:g}: that is the same"
    else:
        return
    for setting, value in described.items():
        if found.get(setting, value) != value:
            raise ArgumentError(
                f"{name} has {setting}={found[setting]!r}: config.json cannot say so, and whoever opens it would build "
                f"{setting}={value!r}{advice}"
            )


def _padding(layer: Any) -> Any:
    """Return how many rows and columns of zeros a convolution puts around an image, at the start and at the end."""
    if getattr(layer, "even_kernel", False):
        return [(before, after) for before, after in (layer.border[2:], layer.border[:2])]
    if layer.padding == "same":
        return [((side - 1) // 2, side // 2) for side in layer.kernel_size]
    return [(side, side) for side in ((0, 0) if layer.padding == "valid" else layer.padding)]


def _numbers(act: nn.Module) -> dict[str, Any]:
    """Return the settings of an activation that change what it computes."""
    return {name: value for name, value in vars(act).items() if name in _ACTIVATION_SETTINGS}


def architecture(shape: dict[str, int | str]) -> tuple[str, dict[str, Any]]:
    """Return a registered name, and the arguments by which a model of that shape differs from it.

    timm's three names take none of these arguments, so a model of another size gets one of the other names.
    """
    for variant in VARIANTS:
        if variant.architecture == shape:
            return variant.name, {}

    def differing(variant: Variant) -> int:
        return sum(variant.architecture[key] != value for key, value in shape.items())

    ours = [v for v in VARIANTS if timm.model_entrypoint(v.name).__module__ != TimmConvMixer.__module__]
    return min(ours, key=differing).name, dict(shape)


def config_of(model: Any, labels: Sequence[str] | None, licence: str) -> dict[str, Any]:
    """Return config.json as timm reads it, in the subset that transformers also reads.

    Args:
        model: A ConvMixer of this package or of timm.
        labels: Class names; of a model with one output those of both classes.
        licence: SPDX identifier, or "".

    Raises:
        ArgumentError: The head is not a Linear, the activation has no name, or the model has no preprocessing.
    """
    name, arguments = architecture(shape_of(model))
    in_chans, pool, classes = model.stem[0].in_channels, model.global_pool.pool_type, num_classes(model)
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    if pool != "avg":
        arguments["global_pool"] = pool
    found = preprocessing(model)
    config: dict[str, Any] = {"architecture": name, "num_classes": classes, "num_features": model.num_features}
    if labels:
        # For the other libraries one output has one name; `read_config` prefers both names.
        config["label_names"] = labels[-classes:]
        own = tuple(() if found.get("label_names") is None else found["label_names"])[-classes:]
        if found.get("label_descriptions") and own == tuple(config["label_names"]):  # else they are of other classes
            config["label_descriptions"] = found["label_descriptions"]
    # There even if empty, and without num_classes: transformers would make null of it, which timm cannot open.
    config["model_args"] = arguments
    config["pretrained_cfg"] = _pretrained_cfg(model, found, labels, licence)
    result: dict[str, Any] = json.loads(json.dumps(config))
    return result


def _pretrained_cfg(model: Any, found: Mapping[str, Any], labels: Sequence[str] | None, licence: str) -> dict[str, Any]:
    """Return the preprocessing, and what else timm keeps with weights."""
    config = {key: plain(found[key]) for key in PREPROCESSING_CHECKS if found.get(key) is not None}
    if "input_size" not in config:
        raise ArgumentError("the model's pretrained_cfg has no input_size: add it, such as (3, 224, 224)")
    try:
        check_values(config, PREPROCESSING_CHECKS, "the model's pretrained_cfg")
    except WeightsError as error:  # whoever opens the folder would meet it
        raise ArgumentError(str(error)) from error
    (_, height, width), patch, classes = config["input_size"], model.stem[0].kernel_size[0], num_classes(model)
    config |= {"num_classes": classes, "pool_size": [height // patch, width // patch]}
    config |= {"first_conv": "stem.0", "classifier": "head"}
    if licence:
        config["license"] = licence
    if labels and classes == 1:
        config["label_names"] = labels
    return config
