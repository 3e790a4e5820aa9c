"""`config.json` of a folder or a repository: a stranger's text, checked key by key before anything is built from it.

Only the keys below are taken over, each with its type and bounds; none of them names a file, an address or code. Keys
that nobody knows are left out with a warning. What other libraries keep there, such as timm's `hf_hub_id`, is left out
without one.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from convmixer.errors import UnknownModelError, WeightsError, brief, list_first, nearest
from convmixer.hub.json_limits import MAX_BYTES, json_excess
from convmixer.model import ACTIVATIONS, GLOBAL_POOLS
from convmixer.registry import CROP_MODES, INTERPOLATIONS, PREPROCESSING, SHAPE, VARIANTS, Variant

MAX_PARAMETERS = 10**9  # 20 times the largest variant
MAX_SIDE = 4096  # pixels

Check = tuple[Callable[[Any], bool], str]


def _whole(least: int, most: int) -> Check:
    return lambda v: type(v) is int and least <= v <= most, f"a whole number from {least} to {most}"


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and least <= v <= most  # NaN is not


def _one_of(*valid: str) -> Check:
    return lambda v: isinstance(v, str) and v in valid, f"one of {', '.join(map(repr, valid))}"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_size(value: Any) -> bool:
    sides = isinstance(value, list) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)
    return sides and value[0] <= 4096 and max(value[1:]) <= MAX_SIDE


_RATE: Check = (lambda v: _number(0, 1)(v) and v < 1, "a probability in [0, 1)")
_SIZE: Check = (_is_size, f"[channels, height, width] of at most {MAX_SIDE} pixels")
_PART: Check = (lambda v: _number(0, 1)(v) and v > 0, "a part of the image in (0, 1]")
_TEXT: Check = (lambda v: isinstance(v, str), "a text")


def _per_channel(least: float) -> Check:
    def check(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) <= 4096 and all(map(_number(least, 1e6), value))

    return check, f"a list of numbers from {least:g}, one for each channel,"


_NUM_CLASSES = _whole(0, 10**6)
_MODEL_ARGS: dict[str, Check] = {
    "dim": _whole(1, 2**16),
    "depth": _whole(1, 1000),
    "kernel_size": _whole(1, 255),
    "patch_size": _whole(1, 1024),
    "in_chans": _whole(1, 4096),
    "num_classes": _NUM_CLASSES,
    "global_pool": _one_of(*GLOBAL_POOLS),
    "act_layer": _one_of(*ACTIVATIONS),
    "drop_rate": _RATE,
    "block_drop_rate": _RATE,
    "drop_path_rate": _RATE,
}
_DESCRIPTIONS: Check = (
    lambda v: isinstance(v, str) or _texts(list(v.values()) if isinstance(v, dict) else v),
    "texts, in a list or by label,",
)
_LABELS: dict[str, Check] = {"label_names": (_texts, "a list of texts"), "label_descriptions": _DESCRIPTIONS}
PREPROCESSING_CHECKS: dict[str, Check] = {
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "min_input_size": _SIZE,
    "interpolation": _one_of(*INTERPOLATIONS),
    "crop_pct": _PART,
    "test_crop_pct": _PART,
    "crop_mode": _one_of(*CROP_MODES),
    "mean": _per_channel(-1e6),
    "std": _per_channel(1e-6),
}
_PRETRAINED_CFG: dict[str, Check] = {
    "num_classes": _NUM_CLASSES,
    **PREPROCESSING_CHECKS,
    **_LABELS,
    "license": _TEXT,
    "tag": _TEXT,
}
# What the header of a safetensors file says, the texts as they are and the rest as JSON.
HEADER_CHECKS = {"label_names": _LABELS["label_names"], **{n: PREPROCESSING_CHECKS[n] for n in PREPROCESSING}}
_KNOWN_TO_TIMM = {field.name for field in dataclasses.fields(PretrainedCfg)} | {"classifier", "first_conv"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config.json says, checked.

    Attributes:
        variant: The registry's variant that it starts from.
        model_args: Arguments of `ConvMixer` that differ from the variant's; `in_chans` is always there.
        preprocessing: Keys of timm's pretrained_cfg: `num_classes`, `input_size`, mean and std, label names, ...
    """

    variant: Variant
    model_args: dict[str, Any]
    preprocessing: dict[str, Any]


def read_config(path: Path, name: str) -> Config:
    """Read and check a config.json in timm's form.

    Args:
        path: The file.
        name: Of the model, for messages.

    Raises:
        UnknownModelError: It is of another architecture.
        WeightsError: It cannot be read, or a value makes no sense; the text says which key.
    """
    source = f"{name}: {str(path)!r}"
    content = _parse(path, name)
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        raise WeightsError(f"{source} names no architecture, as timm's config.json does")
    architecture = content["architecture"].partition(".")[0]
    names = [v.name for v in VARIANTS]
    if architecture not in names:
        raise UnknownModelError(
            f"{name} is a {brief(repr(architecture))}, not a ConvMixer; {nearest(architecture, names)}"
        )
    variant = VARIANTS[names.index(architecture)]
    if "pretrained_cfg" not in content:  # in an older form of timm's its keys are at the top
        flat = {key: content[key] for key in _PRETRAINED_CFG if key in content}
        content = {"label_names": content.get("labels"), **content, "pretrained_cfg": flat}
    given = {part: content.get(part) or {} for part in ("model_args", "pretrained_cfg")}
    if not all(isinstance(value, dict) for value in given.values()):
        raise WeightsError(f"{source}: model_args and pretrained_cfg must be objects")
    model_args = check_values(given["model_args"], _MODEL_ARGS, source)
    preprocessing = check_values(given["pretrained_cfg"], _PRETRAINED_CFG, source)
    both = preprocessing.get("label_names", ())  # of a model with one output, where timm has room for one name
    preprocessing |= check_values(content, {**_LABELS, "num_classes": _NUM_CLASSES}, source)
    if len(both) == 2 and both[1:] == preprocessing["label_names"]:
        preprocessing["label_names"] = both
    unknown = [f"model_args {brief(repr(key))}" for key in given["model_args"] if key not in _MODEL_ARGS]
    unknown += [
        f"pretrained_cfg {brief(repr(key))}"
        for key in given["pretrained_cfg"]
        if key not in _PRETRAINED_CFG and key not in _KNOWN_TO_TIMM
    ]
    if unknown:
        warnings.warn(f"{source} has unknown keys, which are left out: {list_first(unknown, most=10)}", stacklevel=5)

    classes = model_args.pop("num_classes", None)
    preprocessing.setdefault("num_classes", variant.num_classes if classes is None else classes)
    if classes not in (None, preprocessing["num_classes"]):
        raise WeightsError(
            f"{source} says num_classes={classes} in model_args and {preprocessing['num_classes']} elsewhere"
        )
    _check_labels(content, preprocessing, source)
    size = preprocessing.get("input_size", variant.input_size)
    channels = model_args.setdefault("in_chans", size[0])
    preprocessing["input_size"] = (channels, *size[1:])
    sizes = {**variant.architecture, **model_args}
    shape = {key: sizes[key] for key in SHAPE}
    count = dataclasses.replace(
        variant, **shape, num_classes=preprocessing["num_classes"], input_size=preprocessing["input_size"]
    ).parameters
    if count > MAX_PARAMETERS:
        raise WeightsError(f"{source} describes a model of {count:,} parameters; at most {MAX_PARAMETERS:,} are built")
    return Config(variant, model_args, preprocessing)


def _check_labels(content: Mapping[str, Any], preprocessing: dict[str, Any], source: str) -> None:
    """Warn of class names that cannot be meant; transformers keeps `label_names` when a user sets its `id2label`."""
    labels, count = preprocessing.get("label_names"), preprocessing["num_classes"]
    if not labels:
        return
    advice = "Before transformers saves a model, set model.config.label_names = list(model.config.id2label.values())"
    if len(labels) != count and (len(labels), count) != (2, 1):  # one output tells two classes apart
        del preprocessing["label_names"]
        warnings.warn(
            f"{source} has {len(labels)} label_names for {count} classes: they are left out. {advice}", stacklevel=6
        )
        return
    others = content.get("id2label")
    if not isinstance(others, dict) or {str(i) for i in range(len(labels))} != set(others):
        return
    for i, label in enumerate(labels):
        if others[str(i)] != label:
            warnings.warn(
                f"{source} calls class {i} {brief(label)!r} in label_names, which counts, and "
                f"{brief(str(others[str(i)]))!r} in id2label. {advice}",
                stacklevel=6,
            )
            return


def _parse(path: Path, name: str) -> Any:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise WeightsError(f"{name}: {str(path)!r} is not a file")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{name}: cannot read {str(path)!r}: {reason}") from error
    if excess := json_excess(text):
        raise WeightsError(f"{name}: {str(path)!r} has {excess}: it is not a config.json")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{name}: {str(path)!r} is not JSON: {error}") from error


def check_values(given: Mapping[str, Any], checks: Mapping[str, Check], source: str) -> dict[str, Any]:
    """Return the values of the keys that have a check; null counts as not given, lists become tuples."""
    values = {}
    for key, (check, wanted) in checks.items():
        value = given.get(key)
        if value is None:
            continue
        if not check(value):
            raise WeightsError(f"{source}: {key}={brief(repr(value))}: {wanted} is needed")
        values[key] = tuple(value) if isinstance(value, list) else value
    return values
