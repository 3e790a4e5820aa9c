"""What is published: the model meant, and what is known of it, by the caller, its run or the registry."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer.errors import ArgumentError, DataError, check_names
from convmixer.factory import open_model, open_run, read_recipe
from convmixer.hub.write_config import num_classes
from convmixer.inference import known_labels
from convmixer.model import ConvMixer
from convmixer.registry import Metric, get_variant
from convmixer.wrappers import ADVICE, describe, unwrap

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10"}  # data sets of the Hub by label set


@dataclass(frozen=True)
class Publishable:
    """A model and all that its card says of it.

    Attributes:
        model: A ConvMixer of this package or of timm.
        labels: Class names by index, if they are known; of a model with one output those of both classes.
        licence: SPDX identifier in lower case, or "".
        metrics: Measured figures.
        training_data: What it was trained on.
        recipe: How it was trained.
        description: A few sentences of the user.
        tags: Further tags of the card.
        dataset: Name of the training data on the Hub, or "".
        extra: Content of further files of the repository, by their paths.
        file: Weights that are published as they are, so that their sha256 holds; None: those of the model are written.
    """

    model: Any
    labels: tuple[str, ...] | None
    licence: str
    metrics: tuple[Metric, ...]
    training_data: str
    recipe: str
    description: str
    tags: tuple[str, ...]
    dataset: str
    extra: dict[str, bytes]
    file: Path | None = None


def gather(
    given: nn.Module | str | Path,
    metrics: Mapping[str, float] | Sequence[Metric],
    test_data: str,
    licence: str,
    training_data: str,
    recipe: str,
    description: str,
    tags: Sequence[str],
    label_names: Sequence[str] | None,
) -> Publishable:
    """Return the model meant, and what is known of it: by the caller, else by its run or its record in the registry.

    The arguments are those of `save_pretrained`.

    Raises:
        ArgumentError: Not a ConvMixer, or a value that makes no sense.
        DataError: A folder that is not that of a finished run.
    """
    if isinstance(tags, str):
        raise ArgumentError(f"tags={tags!r}: give a list of strings")
    measured = _metrics(metrics, test_data)
    if test_data and not measured:
        raise ArgumentError(f"test_data={test_data!r} says what metrics were measured on: give metrics too")
    known: dict[str, Any] = {}
    given = os.path.expanduser(given) if isinstance(given, str | Path) else unwrap(given)
    if isinstance(given, nn.Module):
        model = given
    elif os.path.isdir(given):
        model, known = _read_run(Path(given))
    else:
        model = open_model(given, device="cpu")
        known = {"licence": model.pretrained_cfg.get("license") or ""}
        known |= {} if os.path.isfile(given) else _read_registry(str(given))
    if not isinstance(model, ConvMixer | TimmConvMixer):
        raise ArgumentError(
            f"{describe(model)} is not a ConvMixer, without features_only and before optimize: {ADVICE}"
        )
    return Publishable(
        model=model,
        labels=_labels(model, label_names),
        licence=(licence or known.get("licence", "")).lower(),
        metrics=measured or known.get("metrics", ()),
        training_data=training_data or known.get("training_data", ""),
        recipe=recipe or known.get("recipe", ""),
        description=description,
        tags=tuple(tags),
        dataset=known.get("dataset", ""),
        extra=known.get("extra", {}),
        file=known.get("file"),
    )


def _metrics(given: Mapping[str, float] | Sequence[Metric], test_data: str) -> tuple[Metric, ...]:
    records: Sequence[Any]
    if isinstance(given, Mapping):
        records = [Metric(str(k), v, test_data or "a test set without a name", "") for k, v in given.items()]
    else:
        records = tuple(given or ())
    for record in records:
        if not isinstance(record, Metric):
            raise ArgumentError(
                f"metrics={given!r}: give a mapping such as {{'top-1': 88.2}}, or convmixer.registry.Metric records"
            )
    return tuple(replace(record, value=_number(record)) for record in records)


def _number(record: Metric) -> float:
    """Return the value of a metric as Python's own number: those of NumPy, and tensors, are none to YAML."""
    value: Any = record.value
    if not isinstance(value, bool | str):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # of what has no single value
            if math.isfinite(value):
                return value if type(value) in (int, float) else float(value)
    raise ArgumentError(f"metric {record.name!r} is {value!r}: give a number, accuracy in percent")


def _labels(model: Any, given: Sequence[str] | None) -> tuple[str, ...] | None:
    count = num_classes(model)
    if given is None:
        return known_labels(model) if count else None
    given = check_names("label_names", given)
    if len(given) not in ((1, 2) if count == 1 else (count,)):
        raise ArgumentError(
            f"label_names has {len(given)} entries, the model {count} classes: give one string for each"
            + ("; with one output, the names of both classes will also do" if count == 1 else "")
        )
    return (f"not {given[0]}", given[0]) if len(given) == count == 1 else tuple(given)


def _read_run(run: Path) -> tuple[ConvMixer, dict[str, Any]]:
    """Return the model of a finished run, and what its folder says."""
    if not (run / "result.json").is_file() and (run / "config.json").is_file():  # recipe.json may be in both
        raise ArgumentError(
            f"{str(run)!r} is a folder in the Hub's form already. Publish it as it is with `hf upload OWNER/NAME "
            f"{run}`, or give local-dir:{run} to write another card for it"
        )
    recipe = read_recipe(run)
    model: ConvMixer = open_run(run, recipe, device="cpu")
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(run)!r} is not the folder of a finished run, whose end writes a result.json: {error}. Finish it "
            "with --resume, or load its weights with create_model(..., checkpoint=...) and publish that model"
        ) from error
    for name in ("model", "checkpoint", "teacher"):
        recipe[name] = _without_folder(recipe.get(name, ""))
    extra = {"recipe.json": (json.dumps(recipe, indent=2) + "\n").encode()}
    for path in ("metrics.csv", "plots/history.png"):
        if (run / path).is_file():
            extra[path] = (run / path).read_bytes()
    return model, {**_facts_of_run(recipe, result), "extra": extra}


def _facts_of_run(recipe: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return what recipe.json and result.json say for a card, without the folders of this computer."""
    from convmixer.training.recipe import Recipe  # imports all of training

    default = json.loads(json.dumps(asdict(Recipe())))
    changed = [f"`{k}={v!r}`" for k, v in recipe.items() if k != "note" and v != default.get(k)]
    steps = [f"`convmixer train` with the defaults of its `Recipe`{', but ' if changed else ''}{', '.join(changed)}."]
    seconds, device = result.get("train_seconds"), result.get("device")
    if seconds and device:
        steps.append(f"{seconds / 3600:.2f} hours on {device}.")
    if result.get("validation_accuracy") is not None:
        steps.append(f"Accuracy on the validation images: {result['validation_accuracy']:.2f} %.")
    data, count = _without_folder(result.get("data", "")), result.get("training_images")
    return {
        "metrics": tuple(
            Metric(
                "top-1",
                top1,
                f"{_without_folder(name)} ({result['test_images'][name]:,} images)",
                "convmixer train, at its end",
            )
            for name, top1 in result.get("test_accuracy", {}).items()
        ),
        "recipe": " ".join(steps),
        "training_data": f"{data}, {count:,} images" if data and count is not None else data,
        "dataset": data.removeprefix("hfds/") if data.startswith("hfds/") and data == result["data"] else "",
    }


def _without_folder(name: str) -> str:
    """Name a file, model or data set without its folder; names of the Hub and of torchvision stay."""
    scheme = next((s for s in ("hf-hub:", "torch/", "hfds/", "wds/", "local-dir:") if name.startswith(s)), "")
    location = name.removeprefix(scheme)
    if scheme in ("hf-hub:", "torch/") or (scheme == "hfds/" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location)):
        return name
    return scheme + re.split(r"[/\\]", location.rstrip("/\\"))[-1]


def _read_registry(name: str) -> dict[str, Any]:
    """Return what the registry says about the weights of that name; nothing about other names."""
    weights = None if ":" in name else get_variant(name)[1]
    if weights is None:
        return {}
    about = {"metrics": weights.metrics, "licence": weights.licence, "file": weights.path}
    about["dataset"] = HUB_DATASETS.get(weights.labels, "")
    return {**about, "training_data": weights.training_data, "recipe": weights.recipe}
