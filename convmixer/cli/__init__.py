"""The command line: parse, call one public function, print."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convmixer import plots
from convmixer.data.images import read_image
from convmixer.data.layout import count_images, describe_left_out, list_folder
from convmixer.data.memory import fitting, load_images
from convmixer.errors import ArgumentError, ConvMixerError, ImageError, TrainingStopped, UnknownModelError
from convmixer.evaluation import ClassAccuracy, Evaluation
from convmixer.evaluation import validate as validate_model
from convmixer.factory import create_model, extractor, open_model
from convmixer.hub.checkpoints import check_writable, write_atomically
from convmixer.hub.convert import convert_checkpoint
from convmixer.hub.publish import push_to_hub, save_pretrained
from convmixer.inference import label_names, least_size
from convmixer.inference import predict as predict_images
from convmixer.registry import Variant, list_models, model_info
from convmixer.runtime.benchmark import Report, benchmark
from convmixer.runtime.candidates import DTYPES
from convmixer.runtime.choose import BACKENDS
from convmixer.runtime.export import FORMATS, OPSET, export_model
from convmixer.runtime.optimize import optimize
from convmixer.runtime.quantize import calibration_images
from convmixer.training import Recipe, get_recipe
from convmixer.training import train as run_training
from convmixer.training.history import read_history
from convmixer.training.loop import PRECISIONS, choose_precision
from convmixer.transforms import preprocessing

OUT = Console(highlight=False, emoji=False)
ERR = Console(stderr=True, highlight=False, emoji=False)


_DATA = "Folder, .tar, table of labels, or a name such as torch/cifar10."
_LABELS = "A .csv, .tsv or .parquet file with the columns image and label, in place of class folders."
_DRAFT = "Decode large JPEG photographs at a reduced scale, which is faster."


class _Command(click.Command):
    """Expands `~` at the start of an argument or of an option's value, where a shell may not."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        def expand(argument: str) -> str:
            option, value = re.fullmatch(r"(--[\w-]+=)?(.*)", argument, re.DOTALL).groups("")  # type: ignore[union-attr]
            return option + os.path.expanduser(value)

        return super().parse_args(ctx, [expand(argument) for argument in args])


class _Group(click.Group):
    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _any_text():
                return super().invoke(ctx)
        except ConvMixerError as error:
            _complain(error)
            ctx.exit(2)


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """What the console's encoding lacks is escaped within the block, where Python would raise."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _plain(text: object) -> str:
    """Text that a terminal shows as it is: no markup, no control sequences, nothing that its encoding lacks."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return escape(shown.encode(OUT.encoding, "backslashreplace").decode(OUT.encoding))  # tables know their width


def _say(text: object) -> None:
    OUT.print(_plain(text), soft_wrap=True)


def _note(text: object) -> None:
    """A line beside an output that programs read."""
    ERR.print(_plain(text), soft_wrap=True)


def _complain(error: object) -> None:
    ERR.print(f"[red]error:[/red] {_plain(error)}", soft_wrap=True)


def _progress(items: Iterable[Any], description: str = "") -> Iterator[Any]:
    """A progress bar on standard error, where a person is looking."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        yield from bar.track(items, description=description)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="convmixer")
def main() -> None:
    """ConvMixer models: list them, classify images, train, measure, publish, convert, export, draw figures."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32; in Python the flag is the caller's


# ---- the registry ---------------------------------------------------------------------------------------------------


def _record(variant: Variant) -> dict[str, Any]:
    derived = {"parameters": variant.parameters, "macs": variant.macs}
    record = dataclasses.asdict(variant) | derived
    for entry, weights in zip(record["weights"], variant.weights, strict=True):
        entry["source"] = weights.source
    return record


@main.command("list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only models that have weights.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the models whose name matches PATTERN."""
    variants = [model_info(name) for name in list_models(pattern, pretrained=pretrained)]
    if as_json:
        click.echo(json.dumps([_record(variant) for variant in variants], indent=2))
        return
    if not variants:
        _say(f"no model matches {pattern!r}")
    table = Table(box=None, header_style="bold")
    for title in ("model", "input", "params", "MACs", "weights", "top-1"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("params", "MACs", "top-1") else "left")
    for v in variants:
        tags = "\n".join(f"{w.tag} ({'package' if w.path else 'Hub'})" for w in v.weights)
        top1 = "\n".join(f"{w.metrics[0].value:.2f}" for w in v.weights)
        table.add_row(v.name, f"{v.input_size[1]}", f"{v.parameters / 1e6:.2f} M", f"{v.macs / 1e9:.2f} G", tags, top1)
    OUT.print(table)


@main.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(name: str, as_json: bool) -> None:
    """Say all about the model NAME."""
    variant = model_info(name)
    if as_json:
        click.echo(json.dumps(_record(variant), indent=2))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows: list[tuple[str, object]] = [
        ("model", variant.name),
        ("dim / depth", f"{variant.dim} / {variant.depth}"),
        ("kernel / patch", f"{variant.kernel_size} / {variant.patch_size}"),
        ("activation", variant.act_layer),
        ("parameters", f"{variant.parameters:,}"),
        ("MACs", f"{variant.macs:,}"),
        ("input", "x".join(map(str, variant.input_size))),
        ("mean, std", f"{variant.mean}, {variant.std}"),
        ("resize", f"{variant.interpolation}, {variant.crop_mode}, crop {variant.crop_pct}"),
        ("classes", variant.num_classes),
    ]
    if variant.note:
        rows.append(("note", variant.note))
    for weights in variant.weights:
        rows += [
            ("", ""),
            ("weights", f"{variant.name}.{weights.tag}"),
            ("source", weights.source),
            ("licence", weights.licence),
            ("sha256", weights.sha256 or "unknown"),
            ("size", f"{weights.size:,} bytes" if weights.size else "unknown"),
            ("trained on", weights.training_data),
            ("recipe", weights.recipe),
        ]
        if weights.machine:
            rows += [("trained by", weights.machine), ("time", f"{weights.training_seconds:,.0f} s")]
            rows += [("seed", weights.seed)]
        rows += [(m.name, f"{m.value:.2f} % {m.dataset} ({m.measured_by})") for m in weights.metrics]
    for title, value in rows:
        table.add_row(title, _plain(value))
    OUT.print(table)


# ---- images ---------------------------------------------------------------------------------------------------------


def _find_images(sources: Iterable[str]) -> list[str]:
    found: list[str] = []
    for source in sources:
        if os.path.isdir(source):
            inside = list_folder(source)
            left_out = describe_left_out(inside.left_out)
            if not inside.images:
                raise ImageError(f"no images in the folder {source!r}" + (f"; it holds {left_out}" if left_out else ""))
            if left_out:
                _note(f"{source}: {count_images(len(inside.images))}; left out: {left_out}")
            found += [file.path for file in inside.images]
        else:
            found.append(source)
    return found


@main.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--model", "name", default="convmixer_256_8.cifar10", show_default=True, help="Any name of create_model.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A .safetensors file to load in place of its weights."
)
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--draft/--no-draft", default=True, show_default=True, help=_DRAFT)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def predict(
    ctx: click.Context,
    images: tuple[str, ...],
    name: str,
    checkpoint: Path | None,
    topk: int,
    batch_size: int,
    draft: bool,
    device: str,
    as_json: bool,
) -> None:
    """Classify IMAGES: files, http and https URLs, and folders with all images that they hold.

    The exit status is 1 if an image could not be read; the others are classified all the same.
    """
    paths = _find_images(images)
    model = create_model(name, pretrained=True, device=device, checkpoint=checkpoint)
    least = least_size(model) if draft else None
    results: list[dict[str, Any]] = []
    for start in range(0, len(paths), batch_size):
        readable, opened = [], []
        for path in paths[start : start + batch_size]:
            results.append({"image": path})
            try:
                opened.append(read_image(path, model.in_chans, least=least))
                readable.append(results[-1])
            except ImageError as error:
                results[-1]["error"] = str(error)
                _complain(error)
        if opened:
            for result, prediction in zip(readable, predict_images(model, opened, topk), strict=True):
                result["predictions"] = [{"label": label, "probability": p} for label, p in prediction]
    if as_json:
        click.echo(json.dumps(results, indent=2))
    elif any("predictions" in result for result in results):
        table = Table("image", "label", "probability", box=None, header_style="bold")
        table.columns[0].overflow = "fold"  # a path that is cut off names no image
        table.columns[2].justify = "right"
        for result in results:
            for i, guess in enumerate(result.get("predictions", ())):
                shown = _plain(result["image"]) if i == 0 else ""
                table.add_row(shown, _plain(guess["label"]), f"{100 * guess['probability']:.1f} %")
        OUT.print(table)
    if any("error" in result for result in results):
        ctx.exit(1)


# ---- training and conversion ----------------------------------------------------------------------------------------


def _recipe_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    if not equals or name not in fields:
        raise click.BadParameter(f"{text!r}: give FIELD=VALUE with a field of {', '.join(fields)}")
    kind: Any = type(fields[name].default)
    try:
        if "tuple" in str(fields[name].type) and value.startswith("["):
            kind = tuple
        if kind is bool:
            return name, {"true": True, "false": False}[value.lower()]
        if kind is tuple:
            return name, tuple(tuple(item) if isinstance(item, list) else item for item in json.loads(value))
        return name, kind(value)
    except (ValueError, TypeError, KeyError) as error:
        what = {tuple: "list such as [2, 12]", bool: "true or false"}.get(kind, kind.__name__)
        raise click.BadParameter(f"{text!r}: {value!r} is no {what}") from error


@main.command()
@click.argument("recipe")
@click.option("--data", required=True, help=_DATA)
@click.option("--val", help="A validation set, in place of one in the data and of images held out.")
@click.option("--test", "tests", multiple=True, help="A further test set; may be given again.")
@click.option("--labels", help=_LABELS)
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/RECIPE]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded data sets lie.")
@click.option("--download", is_flag=True, help="Let torch/ data sets download.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and say which.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode a stream.  [default: one per core]")
@click.option("--resume", is_flag=True, help="Go on where OUTPUT was left.")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", show_default=True)
@click.option("--compile", is_flag=True, help="Use torch.compile; it needs a C++ compiler on a CPU, Triton on a GPU.")
@click.option("--fused", is_flag=True, help="Use fused blocks, which keep less than half of the activations.")
@click.option(
    "--graph/--no-graph", default=None, help="Run steps as CUDA graphs, or not.  [default: where they can be]"
)
@click.option("--tracker", "trackers", multiple=True, help="A tracker of accelerate's, such as tensorboard.")
@click.pass_context
def train(
    ctx: click.Context,
    /,
    recipe: str,
    data: str,
    output: Path | None,
    settings: tuple[str, ...],
    graph: bool | None,
    **options: Any,
) -> None:
    """Train by RECIPE, such as cifar10 or, made for a CPU, cifar10-cpu.

    SIGTERM and Ctrl-C save the run to the step; --resume goes on from there. While --compile compiles they end it at
    once, and what was saved before is kept.
    """
    chosen = get_recipe(recipe, **dict(_recipe_value(text) for text in settings))
    options["graph"] = "auto" if graph is None else graph
    try:
        run_training(chosen, data, output or Path("runs") / recipe, progress=_progress, report=_say, **options)
    except TrainingStopped as stop:
        _complain(stop)
        ctx.exit(128 + stop.signal)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--variant", help="The variant that it must be.  [default: recognised from the shapes]")
@click.option("--act-layer", help="Of a folder: the activation.  [default: the variant's, or gelu for other sizes]")
def convert(source: Path, destination: Path, variant: str | None, act_layer: str | None) -> None:
    """Turn the checkpoint SOURCE of another program into DESTINATION.

    DESTINATION is a file that ends in .safetensors, for a variant of the registry; or a folder with a config.json, for
    any size.
    """
    name = convert_checkpoint(source, destination, variant=variant, act_layer=act_layer)
    _say(f"{destination}: {name}")
    if name.startswith("local-dir:"):
        model = create_model(name, device="meta")
        config, act = model.pretrained_cfg, type(model.stem[1]).__name__
        size = "x".join(map(str, config["input_size"][1:]))
        _say(
            f"A checkpoint does not tell its activation and preprocessing. Taken are {act}, and the preprocessing of "
            f"{config['architecture']} for {size} pixels: mend {destination / 'config.json'} where that is wrong"
        )


# ---- publishing -----------------------------------------------------------------------------------------------------


def _metric(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(value)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give NAME=VALUE such as top-1=88.2") from error


@main.command()
@click.argument("source", metavar="RUN_OR_MODEL")
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=VALUE", help="Such as top-1=88.2; again for more.")
@click.option("--test-data", default="", help="What the metrics were measured on.")
@click.option("--licence", default="", help="SPDX identifier such as mit.")
@click.option("--training-data", default="", help="What the model was trained on.")
@click.option("--recipe", default="", help="How it was trained.")
@click.option("--description", default="", help="A few sentences for the top of the card.")
@click.option("--tag", "tags", multiple=True, help="A further tag of the card; may be given again.")
@click.option("--private/--public", default=None, help="Of a new repository.  [default: the owner's setting]")
@click.option("--revision", help="Branch to commit to; created if it does not exist.")
@click.option("--create-pr", is_flag=True, help="Open a pull request in place of committing.")
@click.option("--message", default="", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and upload nothing.")
def push(source: str, repo_id: str, metrics: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Publish a run or a model on the Hugging Face Hub, as OWNER/NAME.

    RUN_OR_MODEL is the folder of a run of `convmixer train`, which brings metrics, recipe and curves, a .safetensors
    file, or any name of create_model. The token is HF_TOKEN or what `hf auth login` stored.
    """
    given = dict(_metric(text) for text in metrics)
    published = push_to_hub(source, repo_id, metrics=given, dry_run=dry_run, **options)
    for line in published.card.splitlines() if dry_run else ():
        _say(line)
    for library, difference in published.differences.items():
        _say(f"opened with {library}: logits differ by at most {difference:.1e}")
    for path, size in published.files.items():
        _say(f"{size:12,} bytes  {path}")
    _say(f"dry run: nothing was uploaded to {repo_id}" if dry_run else published.url)


# ---- validation -----------------------------------------------------------------------------------------------------


def _show(result: Evaluation) -> None:
    table = Table(box=None, show_header=result.flip is not None, header_style="bold")
    table.add_column("", style="bold", no_wrap=True)
    columns = [result] if result.flip is None else [result, result.flip]
    for title in ("images as they are", "with mirror images")[: len(columns)]:
        table.add_column(title, justify="right")
    table.add_row("top-1", *(f"{s.top1:.2f} %" for s in columns))
    table.add_row("top-5", *(f"{s.top5:.2f} %" for s in columns))
    table.add_row("loss", *(f"{s.loss:.4f}" for s in columns))
    table.add_row("calibration error", *(f"{s.calibration_error:.2f} %" for s in columns))
    table.add_row("images", f"{result.count:,}")
    table.add_row("images per second", f"{result.images_per_second:,.0f}")
    OUT.print(table)
    _show_classes(result.classes)


def _show_classes(classes: Sequence[ClassAccuracy]) -> None:
    """All of a few classes; of many the worst."""
    many = len(classes) > 20
    shown = sorted(classes, key=lambda c: c.top1)[:10] if many else classes
    table = Table(f"worst 10 of {len(classes)} classes" if many else "class", "top-1", "images", box=None)
    table.header_style = "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in shown:
        table.add_row(_plain(row.label), f"{row.top1:.2f} %", f"{row.count:,}")
    OUT.print()
    OUT.print(table)


@main.command()
@click.argument("model")
@click.option("--data", required=True, help=_DATA)
@click.option("--labels", help=_LABELS)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A .safetensors file to load in place of its weights."
)
@click.option(
    "--split", default="test", show_default=True, help="train, validation or test; of hfds/ data any that there is."
)
@click.option("--flip", is_flag=True, help="Also score with flip test-time augmentation.")
@click.option("--draft/--no-draft", default=True, show_default=True, help=_DRAFT)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="float32", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded data sets lie.")
@click.option("--download", is_flag=True, help="Let torch/ data sets download.")
@click.option("--backend", type=click.Choice(BACKENDS), help="Also measure the optimized model, in this backend.")
@click.option("--int8", is_flag=True, help="Optimize to int8; needs --backend and --calibration.")
@click.option("--calibration", help="Training images for --int8: folder, .tar, or a name such as torch/cifar10.")
@click.option("--output", type=click.Path(path_type=Path), help="A file to write the JSON to.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def validate(
    model: str,
    data: str,
    checkpoint: Path | None,
    device: str,
    backend: str | None,
    int8: bool,
    calibration: str | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL on labelled images: accuracy, loss, calibration, accuracy per class.

    MODEL is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file. With --backend
    it is measured twice: as it is, and optimized.
    """
    if backend is None and (int8 or calibration):
        raise ArgumentError("--int8 and --calibration are for the optimized model: add --backend auto")
    if output:
        check_writable(output)
    opened = open_model(model, checkpoint=checkpoint, device=device)
    precision = options["precision"]
    choose_precision(next(opened.parameters()).device, precision)  # refuses what this device has not
    fast = None
    report = _note if as_json else _say
    if backend:
        dtype = torch.int8 if int8 else precision if precision == "auto" else getattr(torch, precision)
        images: Any = calibration
        if int8 and calibration:
            images = calibration_images(calibration, opened, report=report)
        fast = optimize(opened, backend=backend, dtype=dtype, calibration=images)
    validating = functools.partial(_progress, description="validating")
    result = validate_model(opened, data, progress=validating, report=report, **options)
    after, choice = None, ""
    if fast is not None:
        # The optimized model has its precision in itself.
        settings = {**options, "precision": "float32"}
        again = functools.partial(_progress, description="optimized")
        after = validate_model(fast, data, progress=again, report=lambda _: None, **settings)
        choice = str(getattr(fast, "choice", "eager, the folded module"))
    asked: dict[str, Any] = {"model": model, "checkpoint": checkpoint and str(checkpoint), "data": data}
    asked |= {name: options[name] for name in ("split", "labels", "precision")}
    if after is not None:
        asked["optimized"] = {"choice": choice} | dataclasses.asdict(after)
    text = json.dumps(asked | dataclasses.asdict(result), indent=2)
    if output:
        write_atomically(output, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if as_json:
        click.echo(text)
    else:
        _show(result)
        if after is not None:
            OUT.print()
            _say(f"optimized ({choice})")
            _show(after)
            _say(f"top-1 changed by {after.top1 - result.top1:+.2f} points")


# ---- export ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("source")
@click.option("--format", "format_", type=click.Choice([*FORMATS, "hub"]), required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File or, for hub, folder.  [default: named after SOURCE]",
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A .safetensors file to load in place of its weights."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights.",
)
@click.option("--fold/--no-fold", default=None, help="Fold every BatchNorm.  [default: where the format computes]")
@click.option("--normalization", is_flag=True, help="Take images in [0, 1]: fold mean and std, too.")
@click.option("--image-size", type=click.IntRange(min=1), help="Pixels of a side.  [default: the model's]")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open, as the batch always is.")
@click.option("--opset", type=click.IntRange(min=OPSET), help=f"Of ONNX's operators.  [default: {OPSET}]")
@click.option(
    "--features", "blocks", multiple=True, type=int, help="Return the output of this block; again for more blocks."
)
def export(
    source: str,
    format_: str,
    output: Path | None,
    checkpoint: Path | None,
    dtype: str,
    blocks: tuple[int, ...],
    **options: Any,
) -> None:
    """Write the model SOURCE for another program, and check the file by that program.

    SOURCE is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file. The format hub
    is a folder as `convmixer push` publishes it.
    """
    stem = Path(source).resolve().name if os.path.isdir(source) else Path(source).name.removesuffix(".safetensors")
    stem = re.sub(r"[^\w.-]+", "_", stem)
    if format_ == "hub":
        others = [name for name, value in options.items() if value not in (None, False)]
        if others or blocks or dtype != "float32":
            raise ArgumentError("a hub folder holds the model as it is: leave out --dtype, sizes, and what folds")
        folder = output or Path(f"{stem}-hub")
        save_pretrained(open_model(source, checkpoint=checkpoint, device="cpu") if checkpoint else source, folder)
        _say(f"{folder}: for create_model, timm and transformers as local-dir:{folder}")
        return
    model = open_model(source, checkpoint=checkpoint, device="cpu")
    if blocks:
        model = extractor(model, blocks)
    if output is None:
        what = ("-features" if blocks else "") + ("" if dtype == "float32" else f".{dtype}")
        output = Path(stem + what + FORMATS[format_].suffix)
    used = (Path(source), Path(source) / "model.safetensors", *([checkpoint] if checkpoint else []))
    for file in used:
        if os.path.isfile(file) and output.exists() and output.samefile(file):
            raise ArgumentError(f"{str(output)!r} is the file that is exported: set another --output")
    result = export_model(model, output, format_, dtype=getattr(torch, dtype), **options)
    folded = ", folded" if result.folded else ""
    what = " and ".join(result.outputs)
    checked = f"within {result.difference:.1e} of the model's"
    if math.isnan(result.difference):
        checked = "checked by their specification: this system cannot run them"
    _say(f"{output}: {format_}, {dtype}{folded}, {what} {checked}")


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(source: str, data: str | None, image: Path | None, device: str) -> Iterator[tuple[str, Any]]:
    """Names and figures of all that can be drawn."""
    if os.path.isdir(source):
        history = read_history(Path(source) / "metrics.csv")
        finished = (Path(source) / "model.safetensors").exists()
        model = open_model(source, device=device) if finished else None
        if model is None and (data or image):
            raise ArgumentError(
                f"--data and --image need weights, and {source!r} has no model.safetensors, which the end of a run "
                "writes: leave them out, or give the name of a model"
            )
        yield "history", plots.plot_history(history)
    else:
        try:
            model = open_model(source, device=device)
        except UnknownModelError as error:
            raise UnknownModelError(f"no folder {source!r}, and no model: {error}") from error
    if model is None:
        return
    yield "patch_embedding", plots.plot_patch_embedding(model)
    yield "depthwise_kernels", plots.plot_depthwise_kernels(model)
    if image:
        yield "class_activation", plots.plot_class_activation(model, image)
    if data:
        config = preprocessing(model)
        reading = functools.partial(_progress, description="reading test")
        images = load_images(
            data,
            "test",
            config["input_size"],
            classes=label_names(model),
            progress=reading,
            report=_note,  # standard output lists the files written
            **fitting(config),
        )
        computing = functools.partial(_progress, description="classifying")
        probabilities = plots.class_probabilities(model, images.pixels, progress=computing)
        yield "confusion", plots.plot_confusion(images.labels, probabilities.argmax(1), images.classes)
        yield "mistakes", plots.plot_mistakes(images.pixels, images.labels, probabilities, images.classes)


@main.command()
@click.argument("source", metavar="RUN_OR_MODEL")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [default: RUN/plots or plots/MODEL]")
@click.option("--data", help="Test images for confusion and mistakes: folder, .tar, or a name such as torch/cifar10.")
@click.option("--image", type=click.Path(path_type=Path), help="An image to show the class activation on.")
@click.option("--device", default="auto", show_default=True)
def plot(source: str, output: Path | None, data: str | None, image: Path | None, device: str) -> None:
    """Draw a run's history and a model's weights and mistakes.

    RUN_OR_MODEL is the folder of a run, a .safetensors file, or any name of create_model.
    """
    if output is None:
        named = Path("plots") / re.sub(r"[^\w.-]+", "_", source)
        output = Path(source) / "plots" if os.path.isdir(source) else named
    for name, figure in _figures(source, data, image, device):
        path = output / f"{name}.png"
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot make the folder {str(output)!r}: {error.strerror}; set --output") from error
        plots.write_figure(figure, path)
        _say(path)


# ---- speed ----------------------------------------------------------------------------------------------------------


def _show_benchmark(report: Report) -> None:
    machine = report.machine
    libraries = ", ".join(f"{k} {v}" for k, v in machine.items() if v and k not in ("device", "threads", "system"))
    _say(
        f"{report.model} (weights: {report.weights}) on {machine['device']}, {machine['threads']} threads; {libraries}"
    )
    if report.calibration:
        _say(report.calibration)
    for case in report.cases:
        ceilings = ", ".join(f"{dtype} {value:,.0f}" for dtype, value in case.gemm_gflops.items())
        OUT.print()
        _say(f"batch {case.batch_size} at {case.image_size} pixels; GFLOP/s of a matrix product: {ceilings or 'none'}")
        table = Table(box=None, header_style="bold")
        table.add_column("", no_wrap=True)
        for title in ("dtype", "images/s", "rounds from", "to", "p50 ms", "p90", "p99", "MiB", "error", "of ceiling"):
            table.add_column(title, justify="left" if title == "dtype" else "right", no_wrap=True)
        for r in sorted(case.results, key=lambda r: -(r.images_per_second or 0)):
            if r.images_per_second is None:
                continue
            digits = 0 if r.images_per_second >= 100 else 2
            table.add_row(
                r.name,
                r.dtype,
                *(f"{value:,.{digits}f}" for value in (r.images_per_second, r.slowest, r.fastest)),
                *(f"{value:.2f}" for value in r.latency_ms.values()),
                "" if r.peak_memory_mib is None else f"{r.peak_memory_mib:,.0f}",
                "" if r.relative_error is None else f"{r.relative_error:.0e}",
                "" if r.ceiling_share is None else f"{100 * r.ceiling_share:.1f} %",
            )
        Console(highlight=False, emoji=False, width=max(OUT.width, 120)).print(table)  # narrower would cut figures
        for r in case.results:
            if r.failure:
                _say(f"{r.name} {r.dtype} failed: {r.failure}")
        for ratio in case.ratios:
            spread = f"{ratio.least:.2f} to {ratio.largest:.2f}"
            _say(f"{ratio.dtype}: {ratio.ours} / {ratio.peer} = {ratio.ratio:.2f} ({spread})")


@main.command()
@click.argument("model", default="convmixer_256_8")
@click.option(
    "--batch-size", "batch_sizes", multiple=True, type=click.IntRange(min=1), default=(1, 64), show_default=True
)
@click.option("--image-size", "image_sizes", multiple=True, type=click.IntRange(min=1), help="[default: the model's]")
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS[1:]), help="[default: all]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(tuple(DTYPES)), help="[default: float32 bfloat16]")
@click.option("--calibration", help="Training images for int8: folder, .tar, or a name such as torch/cifar10.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Also time timm's model.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=0.3, show_default=True, help="Per round."
)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="A .safetensors file to load in place of its weights."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="A file to write all figures to.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="A .png file to draw a bar chart into.")
def bench(
    model: str,
    backends: tuple[str, ...],
    dtypes: tuple[str, ...],
    image_sizes: tuple[int, ...],
    calibration: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Time MODEL in all backends and precisions beside timm's, in one process.

    MODEL is any name of create_model, the folder of a run of `convmixer train`, or a .safetensors file.

    Options that may be given again: --batch-size, --image-size, --backend, --dtype.
    """
    for file in filter(None, (json_file, plot_file)):
        check_writable(file)
    if not dtypes:
        dtypes = ("float32", "bfloat16", "int8") if calibration else ("float32", "bfloat16")
    with ERR.status("") as status:
        report = benchmark(
            model,
            backends=backends or None,
            dtypes=dtypes,
            image_sizes=image_sizes or None,
            calibration=calibration,
            report=lambda line: status.update(_plain(line)),
            **options,
        )
    record = dataclasses.asdict(report)
    if json_file:
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(json_file, lambda path: path.write_text(text, encoding="utf-8"))
    if plot_file:
        plots.write_figure(plots.plot_benchmark(record), plot_file)
    _show_benchmark(report)
