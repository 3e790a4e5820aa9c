"""The training loop: one numeric path for every device, a checkpoint after every epoch, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.transforms import v2

from convmixer.checkpoints import save_weights, write_atomically
from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.factory import create_model, resolve_device
from convmixer.model import ConvMixer, evaluating
from convmixer.training.data import READERS, Augment, Images, has_split, hold_out, load_images
from convmixer.training.history import Epoch, write_history
from convmixer.training.recipes import Recipe

Progress = Callable[..., Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves: the trained model, its history, and top-1 in percent per test set."""

    model: ConvMixer
    history: list[Epoch]
    test_accuracy: dict[str, float]
    weights: Path


def _no_progress(items: Iterable[Any], _description: str = "") -> Iterable[Any]:
    return items


def bf16_is_faster(device: torch.device) -> bool:
    """Whether bfloat16 autocast pays: hardware products on a GPU or a CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Computes in bfloat16 by `precision`: "float32", "bfloat16", or "auto" (bfloat16 where it is faster)."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ArgumentError(f"unknown precision {precision!r}; valid: auto, float32, bfloat16")
    enabled = precision == "bfloat16" or (precision == "auto" and bf16_is_faster(device))
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def _normalize(model: nn.Module) -> v2.Transform:
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])])


@torch.inference_mode()
def evaluate(
    model: ConvMixer,
    images: Images,
    *,
    batch_size: int = 64,  # larger activations are mapped anew for every batch on a CPU
    precision: str = "float32",
    progress: Progress = _no_progress,
) -> dict[str, float]:
    """Loss and top-1 accuracy over a split, without augmentation.

    Returns:
        `{"loss": mean cross entropy, "top1": percent, "count": images}`.
    """
    device = next(model.parameters()).device
    normalize = _normalize(model)
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    batches = list(zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True))
    with evaluating(model):
        for pixels, labels in progress(batches, "validating"):
            with autocast(device, precision):
                logits = model(normalize(pixels.to(device))).float()
            labels = labels.to(device)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    count = len(images) or math.nan  # no images, no figures
    return {"loss": loss.item() / count, "top1": 100 * correct.item() / count, "count": len(images)}


def _new_model(recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> ConvMixer:
    rates = {n: getattr(recipe, n) for n in ("drop_rate", "block_drop_rate", "drop_path_rate")}
    pretrained = "." in recipe.model
    torch.manual_seed(recipe.seed)
    model: ConvMixer = create_model(
        recipe.model, pretrained=pretrained, device=device, num_classes=len(classes), **rates
    )
    model.pretrained_cfg |= {"label_names": classes, "num_classes": len(classes)}  # type: ignore[operator]
    return model


def _save_state(folder: Path, recipe: Recipe, model: nn.Module, optimizer: Any, history: list[Epoch]) -> None:
    state = {
        "recipe": json.dumps(dataclasses.asdict(recipe)),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [dataclasses.asdict(epoch) for epoch in history],
    }
    write_atomically(folder / "last.pt", lambda path: torch.save(state, path))


def _load_state(path: Path, recipe: Recipe, model: nn.Module, optimizer: Any) -> list[Epoch]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["recipe"])
    except Exception as error:
        raise ConvMixerError(f"cannot resume from {str(path)!r}: {error}. Delete it to start anew") from error
    asked = json.loads(json.dumps(dataclasses.asdict(recipe)))
    # Another length is no other recipe: the schedule goes on at the same epoch of the new length.
    changed = [
        f"{name} was {saved.get(name)!r}, is {new!r}"
        for name, new in asked.items()
        if saved.get(name) != new and name != "epochs"
    ]
    if changed:
        raise ArgumentError(f"cannot resume {str(path)!r} with another recipe: {'; '.join(changed)}")
    if recipe.epochs < len(state["history"]):
        raise ArgumentError(f"{str(path)!r} has {len(state['history'])} epochs behind it: give epochs of at least that")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [Epoch(**row) for row in state["history"]]


def train(
    recipe: Recipe,
    data: str | Path,
    output: str | Path,
    *,
    tests: Sequence[str | Path] = (),
    data_root: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compile: bool = False,
    progress: Progress = _no_progress,
    report: Callable[[str], None] = print,
) -> TrainingResult:
    """Train a model, validate after every epoch, test at the end.

    Args:
        recipe: From `get_recipe`.
        data: Source of the training split, and of the test split where it has one; see `load_images`.
        output: Folder of the run. It will hold `recipe.json`, `metrics.csv`, `last.pt` (all that resuming needs),
            `model.safetensors` and `result.json`.
        tests: Further test sets.
        data_root: Where downloaded data sets lie: by default `data` for `torch/`, the Hub's cache for `hfds/`.
        download: Let `torch/` data sets download what is missing.
        resume: Go on after the last finished epoch of `output`; with the same data and options, exactly as if there
            had been no interruption. Of the recipe only `epochs` may have changed.
        device: "auto" takes the accelerator if there is one.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the hardware has products for it.
        compile: Use `torch.compile`; on a CPU it needs a C++ compiler.
        progress: Called as `progress(iterable, description)`, for a progress bar.
        report: Takes each line of text.

    Raises:
        ArgumentError: A setting that makes no sense, or a run in `output` that may not be continued or replaced.
        DataError: Data that cannot be found or read.
        ConvMixerError: The loss became infinite or not a number.
    """
    folder = Path(output)
    last = folder / "last.pt"
    if last.exists() and not resume:
        raise ArgumentError(f"{str(folder)!r} holds a run: resume it (--resume) or choose another folder")
    if resume and not last.exists():
        raise ArgumentError(f"nothing to resume: {str(last)!r} does not exist")
    where = resolve_device(device)
    autocast(where, precision)  # what is wrong with it is said before data are read
    started = time.time()
    probe = create_model(recipe.model, device="meta")
    config: dict[str, Any] = probe.pretrained_cfg
    size: tuple[int, int, int] = tuple(config["input_size"])

    def read(source: str | Path, split: str, classes: tuple[str, ...] | None = None) -> Images:
        return load_images(
            source,
            split,
            size,
            classes=classes,
            root=data_root,
            download=download,
            progress=lambda items: progress(items, f"reading {split}"),
        )

    images = read(data, "train")
    test_sets = {}
    for source in ([data] if has_split(data, "test") else []) + list(tests):
        name = str(source) if str(source).startswith(READERS) else Path(source).name
        test_sets[str(source) if name in test_sets else name] = read(source, "test", images.classes)
    training, validation = hold_out(images, recipe.validation_fraction, recipe.seed)
    if len(training) < recipe.batch_size:
        raise ArgumentError(f"{len(training)} training images do not fill one batch of {recipe.batch_size}")
    del images

    model = _new_model(recipe, training.classes, where)
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    history = _load_state(last, recipe, model, optimizer) if resume else []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / "recipe.json",
        lambda path: path.write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"),
    )
    training = training.to(where)
    augment = Augment(recipe, config["mean"], config["std"], where)
    # One compilation per image size is faster than one for all of them.
    step_model = torch.compile(model, dynamic=False) if compile else model
    report(
        f"{recipe.model} on {where.type}: {len(training)} training, {len(validation)} validation images, "
        f"{', '.join(f'{len(s)} test images ({n})' for n, s in test_sets.items()) or 'no test images'}"
    )
    steps = len(training) // recipe.batch_size
    channels_last = not next(model.parameters()).is_contiguous()  # the layout that the factory chose
    for epoch in range(len(history), recipe.epochs):
        # All randomness of an epoch follows from (seed, epoch), so that a resumed run repeats it exactly.
        torch.manual_seed(recipe.seed * 100_003 + epoch)
        random.seed(recipe.seed * 100_003 + epoch)
        begun = time.perf_counter()
        order = torch.randperm(len(training)).to(where)
        loss_sum = torch.zeros((), device=where)
        correct = torch.zeros((), device=where)
        rate = 0.0
        model.train()
        for step in progress(range(steps), f"epoch {epoch + 1}/{recipe.epochs}"):
            done = (epoch * steps + step) / (recipe.epochs * steps)
            rate = recipe.learning_rate(done + 0.5 / (recipe.epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            labels = training.labels[index]
            inputs = augment(training.pixels[index], recipe.image_size(done))
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with autocast(where, precision):
                logits: Tensor = step_model(inputs)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            loss_sum += loss.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
        train_loss = loss_sum.item() / steps
        seconds = time.perf_counter() - begun
        if not math.isfinite(train_loss):
            raise ConvMixerError(
                f"the loss became {train_loss} in epoch {epoch + 1} at a learning rate of up to {rate:.2g}: lower lr "
                f"or set clip_grad; the epochs before it are kept in {str(folder)!r}"
            )
        scores = evaluate(model, validation, precision=precision)
        row = Epoch(
            epoch=epoch + 1,
            learning_rate=rate,
            train_loss=train_loss,
            train_accuracy=100 * correct.item() / (steps * recipe.batch_size),
            validation_loss=scores["loss"],
            validation_accuracy=scores["top1"],
            seconds=seconds,
            images_per_second=steps * recipe.batch_size / seconds,
        )
        history.append(row)
        _save_state(folder, recipe, model, optimizer, history)
        write_history(folder / "metrics.csv", history)
        report(str(row))

    weights = folder / "model.safetensors"
    save_weights(model, weights, {"architecture": recipe.model.split(".")[0], "label_names": list(training.classes)})
    accuracy = {n: evaluate(model, s, progress=progress)["top1"] for n, s in test_sets.items()}
    result = {
        "command": " ".join(["convmixer", *sys.argv[1:]]) if Path(sys.argv[0]).name == "convmixer" else None,
        "recipe": dataclasses.asdict(recipe),
        "validation_accuracy": history[-1].validation_accuracy if len(validation) else None,
        "test_accuracy": accuracy,
        "test_images": {name: len(images) for name, images in test_sets.items()},
        "train_seconds": round(sum(row.seconds for row in history)),
        "last_session_seconds": round(time.time() - started),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    write_atomically(folder / "result.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    for name, top1 in accuracy.items():
        report(f"test {name}: top-1 {top1:.2f} % of {len(test_sets[name])} images")
    return TrainingResult(model, history, accuracy, weights)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
