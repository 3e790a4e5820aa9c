"""Whether reading and augmenting images is off the critical path: epochs of a recipe against its bare training steps.

    python benchmarks/train_epoch.py [cifar10 ...] [--images 5120] [--rounds 3] [--device auto] [--compile]
                                     [--json FILE]

Random images are written as a folder, since their content does not matter here. Each round trains two epochs, of which
the second counts, without its validation, and then makes as many steps on one batch that lies on the device.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from PIL import Image

import convmixer
from convmixer.factory import resolve_device
from convmixer.runtime.cuda_graphs import WARM_UP, CudaGraphs, Graphed
from convmixer.training import Recipe, get_recipe, train
from convmixer.training.machine import choose_fused
from convmixer.training.optimizers import create_optimizer
from convmixer.training.precision import autocast, flush_denormals
from convmixer.training.trainer import build_model


def write_images(folder: Path, count: int, side: int, classes: int = 10) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        of_class = folder / "train" / str(i % classes)
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(of_class / f"{i}.png")


def quiet(_line: str) -> None:
    pass


def bare_steps(recipe: Recipe, count: int, device: torch.device, precision: str, compiled: bool) -> float:
    """Return the seconds of the training steps, in parts as in training, without reading and augmenting images."""
    fused, _ = choose_fused(recipe, device, fused="auto", compile=compiled)
    model = build_model(recipe, tuple("0123456789"), device, fused=fused).train()
    forward = torch.compile(model) if compiled else model
    optimizer = create_optimizer(recipe, model, device)
    part = recipe.batch_size // recipe.accumulate
    x = torch.randn(part, *model.pretrained_cfg["input_size"], device=device)
    if not next(model.parameters()).is_contiguous():
        x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (part,), device=device)

    def compute(x: torch.Tensor, labels: torch.Tensor) -> None:
        for _ in range(recipe.accumulate):
            with autocast(device, precision):
                logits = forward(x)
            F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def failed(error: RuntimeError) -> None:
        raise error

    run = Graphed(compute, CudaGraphs(device) if device.type == "cuda" else None, failed)  # as in training

    def steps(number: int) -> None:
        for _ in range(number):
            run(x, labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    with flush_denormals(device):  # as in training
        steps(WARM_UP + 1)
        begun = time.perf_counter()
        steps(count)
        return time.perf_counter() - begun


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Print and return the seconds of an epoch of a recipe, and of its bare steps."""
    changed = {"batch_size": options.batch_size} if options.batch_size else {}
    recipe = get_recipe(name, epochs=2, validation_fraction=0.0, patience=0, image_sizes=(), **changed)
    device = resolve_device(options.device)
    count = options.images // recipe.batch_size
    epochs, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images, convmixer.model_info(recipe.model).input_size[1])
        for turn in range(options.rounds):
            output = Path(folder) / f"run{turn}"
            settings = {"device": device, "precision": options.precision, "compile": options.compile}
            result = train(recipe, folder, output, **settings, report=quiet)
            epochs.append(count * recipe.batch_size / result.history[1].images_per_second)
            bare.append(bare_steps(recipe, count, device, options.precision, options.compile))
    ratio = harness.ratio(epochs, bare)
    seconds = {"epoch": statistics.median(epochs), "bare steps": statistics.median(bare)}
    speed = count * recipe.batch_size / seconds["epoch"]
    print(
        f"{name}: {speed:.0f} images/s; epoch of {count} steps {seconds['epoch']:.2f} s, "
        f"bare steps {seconds['bare steps']:.2f} s: {ratio:.2f}",
        flush=True,
    )
    found = {"recipe": name, "batch_size": recipe.batch_size, "images": options.images, "images_per_second": speed}
    return {**found, "seconds": seconds, "ratio": ratio}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("recipes", nargs="*", default=["cifar10"])
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    rows = [measure(name, options) for name in options.recipes]
    report = {"precision": options.precision, "compile": options.compile, "recipes": rows}
    harness.write(options.json, report, resolve_device(options.device))


if __name__ == "__main__":
    main()
