"""Publish a model: one folder that convmixer, timm and transformers open, and one commit of it to the Hub."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError, DataError, WeightsError
from convmixer.factory import create_model, open_model, open_run, read_recipe
from convmixer.hub import client
from convmixer.hub.checkpoints import check_keys, read_tensors, save_weights
from convmixer.inference import known_labels
from convmixer.model import ACTIVATIONS, ConvMixer, activation
from convmixer.registry import VARIANTS, Metric, Variant, get_variant
from convmixer.transforms import preprocessing
from convmixer.wrappers import ADVICE, describe, unwrap

Model = TypeVar("Model", bound="ConvMixer | TimmConvMixer")

BEGIN = "<!-- convmixer writes this part anew with each push; text above and below it is kept -->"
END = "<!-- the part that convmixer writes ends here -->"
TOLERANCE = 1e-4  # of the largest logit
# What timm's pretrained_cfg knows of preprocessing; an unknown key there is an error to it.
_PREPROCESSING = (
    "input_size",
    "test_input_size",
    "min_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
)


@dataclass(frozen=True)
class Publication:
    """What `push_to_hub` published, or with `dry_run` would have.

    Attributes:
        repo_id: "owner/name".
        files: Bytes of each file, by its path in the repository.
        card: Text of README.md.
        differences: Largest difference of a logit, by library in which the folder was opened.
        url: Address of the commit or of the pull request; None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    card: str
    differences: dict[str, float]
    url: str | None


@dataclass(frozen=True)
class _Source:
    """A model and all that its card says of it; `extra` are further files of the repository by their paths."""

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


# ---- public functions -----------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module | str | Path,
    directory: str | Path,
    *,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    test_data: str = "",
    licence: str = "",
    training_data: str = "",
    recipe: str = "",
    description: str = "",
    tags: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    repo_id: str = "",
) -> Path:
    """Write a folder that convmixer, timm and transformers open: model.safetensors, config.json, README.md.

    Sizes, activation, head, channels, preprocessing and class names are those of the model. Layout and wrappers do not
    matter: channels_last, `torch.compile`, DataParallel, DistributedDataParallel, torch's AveragedModel and timm's
    ModelEma are undone. Dropout rates,
    which only training needs, are not kept. Files are put in place when all of them are written and the weights have
    been read back; other files of the folder stay, and so does text of its README.md outside the generated part.

    Args:
        model: A ConvMixer of this package or of timm; the folder of a finished run of `convmixer train`, whose recipe,
            results and curves then go into the folder; a .safetensors file; or any name of `create_model`.
        directory: Folder to write; made if it does not exist.
        metrics: In percent: `{"top-1": 88.2}` on `test_data`, or `Metric` records for more than one test set. Those of
            a run or of registered weights are known.
        test_data: What the figures of a mapping were measured on.
        licence: SPDX identifier, such as "mit". It has no default, but that of weights with a name is known.
        training_data: What the model was trained on.
        recipe: How.
        description: A few sentences for the top of the card.
        tags: Further tags of the card.
        label_names: Class names by index; the model's own if None.
        repo_id: "owner/name" on the Hub that the card's examples load from; by default they load from `directory`, of
            an absolute path its name alone, because the card may be published.

    Returns:
        The folder.

    Raises:
        ArgumentError: No ConvMixer, one without preprocessing, or a value that makes no sense.
        WeightsError: Weights that are not finite or do not fit the architecture.
        ConvMixerError: The folder cannot be written. What was in it before is whole.
    """
    folder = Path(os.path.expanduser(directory))
    source = _describe(model, metrics, test_data, licence, training_data, recipe, description, tags, label_names)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"directory={str(folder)!r} is a file: give a folder")
    if repo_id:
        _check_repo_id(repo_id)
    existed = folder.exists()
    with _writing(folder):
        old = folder / "README.md"
        card = old.read_text(encoding="utf-8") if old.is_file() else ""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # Inside the folder, which may be a file system of its own: so files move into place without copying.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
                staging = Path(temporary)
                files = _write(source, staging)
                name = folder.resolve().name
                place = name if folder.is_absolute() else str(folder)
                text = _card(source, repo_id.partition("/")[2] or name, repo_id, place, card)
                (staging / "README.md").write_text(text, encoding="utf-8")
                # Without config.json nothing opens a folder: it comes last.
                for path in [*sorted(set(files) - {"config.json"}), "README.md", "config.json"]:
                    (folder / path).parent.mkdir(exist_ok=True)
                    (staging / path).replace(folder / path)
        except BaseException:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    metrics: Mapping[str, float] | Sequence[Metric] = (),
    test_data: str = "",
    licence: str = "",
    training_data: str = "",
    recipe: str = "",
    description: str = "",
    tags: Sequence[str] = (),
    label_names: Sequence[str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "",
    dry_run: bool = False,
) -> Publication:
    """Publish a model on the Hugging Face Hub: the folder of `save_pretrained`, as one commit.

    Before anything is uploaded, the folder is opened with convmixer, with timm, and with transformers if it is
    installed; the logits must be those of the model and the class names the same. Text that somebody wrote into the
    card outside the generated part is kept. If others commit at the same time, nothing of theirs is overwritten.

    Args:
        model: As for `save_pretrained`, and so are `metrics`, `test_data`, `licence`, `training_data`, `recipe`,
            `description`, `tags` and `label_names`.
        repo_id: "owner/name"; the repository is created if it does not exist.
        metrics: See above.
        test_data: See above.
        licence: See above.
        training_data: See above.
        recipe: See above.
        description: See above.
        tags: See above.
        label_names: See above.
        private: Whether a new repository is private; by default as the owner has set it on the Hub.
        revision: Branch to commit to, created if it does not exist; by default the main one.
        create_pr: Open a pull request in place of committing.
        token: Access token; by default HF_TOKEN or what `hf auth login` stored. It is never printed nor written.
        message: Of the commit.
        dry_run: Do all but create and upload.

    Raises:
        ArgumentError: As for `save_pretrained`, or no "owner/name".
        WeightsError: A library opens the folder, but computes other logits.
        HubError: The Hub cannot be reached or refuses. It is safe to run the same again.
    """
    _check_repo_id(repo_id)
    name = repo_id.partition("/")[2]
    source = _describe(model, metrics, test_data, licence, training_data, recipe, description, tags, label_names)
    with tempfile.TemporaryDirectory(prefix="convmixer-") as temporary:
        folder = Path(temporary)
        with _writing(folder):
            files = [*_write(source, folder), "README.md"]
        differences = _open_everywhere(source, folder)
        place = client.look(repo_id, revision=revision, token=token)
        if not dry_run:
            place = client.prepare(place, private=private, create_pr=create_pr)
        card = _card(source, name, repo_id, "", place.card)
        with _writing(folder):
            (folder / "README.md").write_text(card, encoding="utf-8")
        paths = {path: folder / path for path in files}
        sizes = {path: file.stat().st_size for path, file in sorted(paths.items())}
        subject = message or f"{name}, written by convmixer"
        url = None if dry_run else client.commit(place, paths, subject, create_pr=create_pr)
    return Publication(repo_id, sizes, card, differences, url)


def _check_repo_id(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ArgumentError(f"repo_id={repo_id!r}: give owner/name, of letters, digits, '-', '_' and '.'")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError, SafetensorError) as error:
        raise ConvMixerError(
            f"cannot write {str(folder)!r}: {error.__cause__ or error}. What it held before is whole: make room, or "
            "choose another folder"
        ) from error


# ---- what is published ----------------------------------------------------------------------------------------------


def _describe(
    given: nn.Module | str | Path,
    metrics: Mapping[str, float] | Sequence[Metric],
    test_data: str,
    licence: str,
    training_data: str,
    recipe: str,
    description: str,
    tags: Sequence[str],
    label_names: Sequence[str] | None,
) -> _Source:
    """The model meant, and what is said of it: by the caller, else by its run or its record in the registry."""
    if isinstance(tags, str) or isinstance(label_names, str):
        raise ArgumentError(f"tags={tags!r}, label_names={label_names!r}: give lists of strings")
    measured = _metrics(metrics, test_data)
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
    return _Source(
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
        value = record.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ArgumentError(f"metric {record.name!r} is {value!r}: give a number, accuracy in percent")
    return tuple(records)


def _labels(model: Any, given: Sequence[str] | None) -> tuple[str, ...] | None:
    count = _num_classes(model)
    if given is None:
        return known_labels(model) if count and count == model.num_classes else None
    if not all(isinstance(label, str) for label in given) or len(given) not in ((1, 2) if count == 1 else (count,)):
        raise ArgumentError(
            f"label_names has {len(given)} entries, the model {count} classes: give one string for each"
            + ("; with one output, names of both classes will do, too" if count == 1 else "")
        )
    return (f"not {given[0]}", given[0]) if len(given) == count == 1 else tuple(given)


def _read_run(run: Path) -> tuple[ConvMixer, dict[str, Any]]:
    """The model of a finished run, and what its folder tells."""
    from convmixer.training.recipe import Recipe  # with it the whole of training is imported

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
            f"{str(run)!r} is no folder of a finished run, whose end writes a result.json: {error}. Finish it with "
            "--resume, or load its weights with create_model(..., checkpoint=...) and publish that model"
        ) from error
    # Not where they lay on this computer.
    recipe["checkpoint"] = _without_place(recipe.get("checkpoint", ""))
    recipe["model"] = _without_place(recipe["model"])
    default = json.loads(json.dumps(dataclasses.asdict(Recipe())))
    changed = [f"`{k}={v!r}`" for k, v in recipe.items() if k != "note" and v != default.get(k)]
    steps = [f"`convmixer train` with the defaults of its `Recipe`, but {', '.join(changed)}."]
    seconds, device = result.get("train_seconds"), result.get("device")
    if seconds and device:
        steps.append(f"{seconds / 3600:.2f} hours on {device}.")
    if result.get("validation_accuracy") is not None:
        steps.append(f"Accuracy on the held-out part of the training images: {result['validation_accuracy']:.2f} %.")
    metrics = tuple(
        Metric(
            "top-1",
            top1,
            f"{_without_place(name)} ({result['test_images'][name]:,} images)",
            "convmixer train, at its end",
        )
        for name, top1 in result.get("test_accuracy", {}).items()
    )
    data = _without_place(result.get("data", ""))
    trained_on = f"{data}, {result['training_images']:,} images" if data and "training_images" in result else data
    extra = {"recipe.json": (json.dumps(recipe, indent=2) + "\n").encode()}
    for path in ("metrics.csv", "plots/history.png"):
        if (run / path).is_file():
            extra[path] = (run / path).read_bytes()
    dataset = data.removeprefix("hfds/") if data.startswith("hfds/") and data == result["data"] else ""
    known = {"metrics": metrics, "recipe": " ".join(steps), "training_data": trained_on, "dataset": dataset}
    return model, {**known, "extra": extra}


def _without_place(name: str) -> str:
    """A file, model or data set without the folder where it lay; names of the Hub and of torchvision stay."""
    scheme = next((s for s in ("hf-hub:", "torch/", "hfds/", "wds/", "local-dir:") if name.startswith(s)), "")
    rest = name.removeprefix(scheme)
    if scheme in ("hf-hub:", "torch/") or (scheme == "hfds/" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", rest)):
        return name
    return scheme + re.split(r"[/\\]", rest.rstrip("/\\"))[-1]


def _read_registry(name: str) -> dict[str, Any]:
    """What the registry tells of the weights of that name; nothing of a name that is not the registry's."""
    weights = None if ":" in name else get_variant(name)[1]
    if weights is None:
        return {}
    about = {"metrics": weights.metrics, "licence": weights.licence}
    return {**about, "training_data": weights.training_data, "recipe": weights.recipe}


# ---- the files ------------------------------------------------------------------------------------------------------


def _write(source: _Source, folder: Path) -> list[str]:
    """Write all but the card; the paths of what was written."""
    config = _config(source)
    expected = _rebuild(source.model).state_dict()
    check_keys(source.model.state_dict(), expected, f"this {type(source.model).__name__}")
    # Without metadata equal weights make equal files, which the Hub takes once.
    save_weights(source.model, folder / "model.safetensors")
    read_tensors(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path, content in source.extra.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    return ["model.safetensors", "config.json", *source.extra]


def _num_classes(model: Any) -> int:
    """By the head itself, which may have been replaced by hand."""
    if isinstance(model.head, nn.Linear):
        return model.head.out_features
    if isinstance(model.head, nn.Identity):
        return 0
    raise ArgumentError(f"the head is a {type(model.head).__name__}: only a Linear can be built again from config.json")


def _shape(model: Any) -> dict[str, int | str]:
    """The constructor's arguments that define the architecture, read off the layers."""
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
        # timm has classes of its own beside some of PyTorch's, of the same name and function.
        if kind is known or (kind.__module__.startswith("torch.nn.") and kind.__name__ == known.__name__):
            return name
    raise ArgumentError(
        f"the activation {kind.__name__} has no name that a config.json could give; valid: {', '.join(ACTIVATIONS)}"
    )


def _rebuild(model: Any) -> ConvMixer:
    """The same architecture without storage."""
    arguments: dict[str, Any] = _shape(model)
    pool = model.global_pool.pool_type
    arguments |= {"in_chans": model.stem[0].in_channels, "num_classes": _num_classes(model), "global_pool": pool}
    return ConvMixer(**arguments, device="meta")


def architecture(shape: dict[str, int | str]) -> tuple[str, dict[str, Any]]:
    """A registered name, and the arguments by which the model differs from it.

    timm's three names take none of these arguments, so that a model of another size goes by one of the others.
    """
    for variant in VARIANTS:
        if variant.architecture == shape:
            return variant.name, {}

    def differing(variant: Variant) -> int:
        return sum(variant.architecture[key] != value for key, value in shape.items())

    ours = [v for v in VARIANTS if timm.model_entrypoint(v.name).__module__ != TimmConvMixer.__module__]
    return min(ours, key=differing).name, dict(shape)


def _config(source: _Source) -> dict[str, Any]:
    """config.json as timm reads it, in the subset that transformers reads, too: no num_classes in model_args."""
    model = source.model
    name, arguments = architecture(_shape(model))
    in_chans, pool = model.stem[0].in_channels, model.global_pool.pool_type
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    if pool != "avg":
        arguments["global_pool"] = pool
    found = preprocessing(model)
    about = {key: found[key] for key in _PREPROCESSING if found.get(key) is not None}
    size = about["input_size"]
    patch = model.stem[0].kernel_size[0]
    about |= {"num_classes": _num_classes(model), "pool_size": [size[1] // patch, size[2] // patch]}
    about |= {"first_conv": "stem.0", "classifier": "head"}
    if source.licence:
        about["license"] = source.licence
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": _num_classes(model),
        "num_features": model.num_features,
    }
    if source.labels:
        # For the others one name is that of one output; `read_config` prefers both.
        config["label_names"] = source.labels[-config["num_classes"] :]
        if config["num_classes"] == 1:
            about["label_names"] = source.labels
        if found.get("label_descriptions"):
            config["label_descriptions"] = found["label_descriptions"]
    # Also where there are none: transformers would make null of what is missing, which timm cannot open.
    config["model_args"] = arguments
    result: dict[str, Any] = json.loads(json.dumps({**config, "pretrained_cfg": about}))
    return result


# ---- opened in each library -----------------------------------------------------------------------------------------


@torch.inference_mode()
def _open_everywhere(source: _Source, folder: Path) -> dict[str, float]:
    """Largest difference of a logit by library; an error where one cannot open the folder or computes another thing."""
    model = copy.deepcopy(source.model).to("cpu", torch.float32).eval()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    x = torch.randn(1, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
    expected = model(x)
    differences = {}
    for library, compute in _LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            continue
        if library == "transformers" and not config["num_classes"]:
            continue  # it has no class for a model without classes
        try:
            logits, labels = compute(folder, x)
        except Exception as error:  # each library has its own errors
            reason = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"{library} cannot open what would be published. {reason}. Nothing was uploaded"
            ) from error
        difference = (logits.float() - expected).abs().max().item()
        if logits.shape != expected.shape or not difference <= TOLERANCE * max(expected.abs().max().item(), 1e-3):
            raise WeightsError(
                f"{library} opens what would be published, but its logits differ by {difference:.2g} from the model's, "
                f"which are up to {expected.abs().max().item():.2g}. Nothing was uploaded"
            )
        if source.labels and tuple(labels or ())[-config["num_classes"] :] != source.labels[-config["num_classes"] :]:
            raise WeightsError(f"{library} reads other class names, {labels!r}. Nothing was uploaded")
        differences[library] = difference
    return differences


def _with_convmixer(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    model = create_model(f"local-dir:{folder}", pretrained=True, device="cpu").eval()
    return model(x), known_labels(model) if model.num_classes else None


def _with_timm(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model(x), model.pretrained_cfg.get("label_names")


def _with_transformers(folder: Path, x: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model(x).logits, list(model.config.id2label.values())


_LIBRARIES: dict[str, Callable[[Path, Tensor], tuple[Tensor, Sequence[str] | None]]] = {
    "convmixer": _with_convmixer,
    "timm": _with_timm,
    "transformers": _with_transformers,
}


# ---- the card -------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text of others that starts no HTML, and in a table no cell."""
    return " ".join(text.replace("<", "&lt;").replace("|", r"\|").split())


def _card(source: _Source, name: str, repo_id: str, folder: str, old: str) -> str:
    """README.md: the Hub's header, and the generated part between two marks, with what `old` says beyond it."""
    shape = _shape(source.model)
    classes = _num_classes(source.model)
    config = preprocessing(source.model)
    parameters = sum(p.numel() for p in source.model.parameters())
    header: dict[str, Any] = {"license": source.licence} if source.licence else {}
    header |= {"library_name": "timm"}
    header |= {"pipeline_tag": "image-classification" if classes else "image-feature-extraction"}
    if source.dataset:
        header["datasets"] = [source.dataset]
    header["tags"] = ["convmixer", "timm", *(["transformers"] if classes else []), *source.tags]
    lines = [BEGIN, f"# {_plain(name)}", ""]
    if source.description:
        lines += [source.description.replace("<!--", "&lt;!--").strip(), ""]
    size = "x".join(map(str, config["input_size"][1:]))
    lines += [
        f"A [ConvMixer](https://arxiv.org/abs/2201.09792) with {parameters / 1e6:.2f} M parameters: "
        f"dim {shape['dim']}, depth {shape['depth']}, kernel size {shape['kernel_size']}, patch size "
        f"{shape['patch_size']}, activation `{shape['act_layer']}`. It takes images of {size} pixels with "
        f"{config['input_size'][0]} channels" + (f" and knows {max(classes, 2):,} classes." if classes else "."),
        "",
    ]
    if classes == 1:
        last = _plain(source.labels[1]) if source.labels else "the second class"
        lines += [f"It has one output, whose sigmoid is the probability of {last}.", ""]
    if source.labels and len(source.labels) <= 20:
        lines += [f"Classes: {', '.join(map(_plain, source.labels))}.", ""]
    lines += [*_usage(source, f"hf-hub:{repo_id}" if repo_id else f"local-dir:{folder}", repo_id or folder), ""]
    if source.metrics:
        lines += ["## Evaluation", "", "| metric | value | test set | measured by |", "| --- | --: | --- | --- |"]
        for m in source.metrics:
            unit = " %" if re.match(r"top|acc|calibration", m.name) else ""
            by = _plain(m.measured_by) or "not stated"
            lines.append(f"| {_plain(m.name)} | {m.value:.2f}{unit} | {_plain(m.dataset)} | {by} |")
        lines.append("")
    lines += ["## Training", "", f"Training data: {_plain(source.training_data).rstrip('.') or 'not stated'}.", ""]
    lines += [f"Recipe: {_plain(source.recipe).rstrip('.') or 'not stated'}.", ""]
    if "recipe.json" in source.extra:
        lines += ["[recipe.json](recipe.json) has every setting.", ""]
    if "plots/history.png" in source.extra:
        lines += ["![Loss, accuracy and learning rate by epoch](plots/history.png)", ""]
    lines += ["## Licence", "", source.licence or "Not stated.", "", END]
    return client.write_card("\n".join(lines), header, name, source.metrics, old)


def _usage(source: _Source, name: str, place: str) -> list[str]:
    """Code that runs as it stands, given an image photo.jpg."""
    config = preprocessing(source.model)
    channels, height, width = config["input_size"]
    photos = channels in (1, 3)  # what images have
    classes = _num_classes(source.model)
    model = f"create_model({json.dumps(name)}, pretrained=True).eval()"
    anything = [f"output = model(torch.rand(1, {channels}, {height}, {width}))"]
    ours = ["import convmixer", *([] if photos and classes else ["import torch"]), "", f"model = convmixer.{model}"]
    if photos and classes:
        ours += [
            'for label, probability in convmixer.predict(model, "photo.jpg", topk=3):',
            "    print(label, probability)",
        ]
    else:
        ours += anything
    theirs = ["import convmixer  # tells timm the architecture", "import timm"]
    if photos:
        mode = "RGB" if channels == 3 else "L"
        theirs += ["from PIL import Image", "", f"model = timm.{model}"]
        theirs += ["transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"]
        theirs += [f'output = model(transform(Image.open("photo.jpg").convert("{mode}")).unsqueeze(0))']
    else:
        theirs += ["import torch", "", f"model = timm.{model}", *anything]
    blocks = {"With convmixer:": ours, "With timm:": theirs}
    if channels == 3 and classes:
        lines = ["import convmixer  # tells timm the architecture", "from transformers import pipeline", ""]
        lines += [f'classify = pipeline("image-classification", {json.dumps(place)})', 'print(classify("photo.jpg"))']
        blocks["With transformers, which asks timm:"] = lines
    return ["## Use", *(f"\n{title}\n\n```python\n" + "\n".join(code) + "\n```" for title, code in blocks.items())]
