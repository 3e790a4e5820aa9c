"""How well weights classify CIFAR-10's test images, as they are and changed; docs/runs.md shows the results.

    python benchmarks/accuracy.py [--data data/cifar10-png] [--output docs/runs] [MODEL ...]

For each model, by default all CIFAR-10 weights that ship, MODEL/evaluation.json in the output folder gets accuracy in
float32, bfloat16 and int8, the confusion matrix and the 25 most confident mistakes in float32, and top-1 on changed
images in bfloat16. DATA holds train.tar and test.tar of class folders; 512 training images calibrate int8. All of it
runs in the native backend, which needs a CPU with AMX for int8.
"""

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import harness
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

import convmixer
from convmixer.data.memory import load_images
from convmixer.data.readers import FileSplit, open_split
from convmixer.evaluation import _scores
from convmixer.plots import class_probabilities

MISTAKES = 25


def shift(pixels: Tensor, by: int) -> Tensor:
    """Shift left, right, up and down in turn from image to image; reflections fill the edges."""
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, by, padding_mode="reflect")
    moved = torch.empty_like(pixels)
    for i, (top, left) in enumerate([(by, 2 * by), (by, 0), (2 * by, by), (0, by)]):
        moved[i::4] = padded[i::4, :, top : top + height, left : left + width]
    return moved


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    return torch.stack([F.jpeg(image, quality) for image in pixels])


def noise(pixels: Tensor, sigma: int) -> Tensor:
    torch.manual_seed(0)
    return F.to_dtype(F.gaussian_noise(F.to_dtype(pixels, scale=True), sigma=sigma / 255), torch.uint8, scale=True)


CHANGES = {
    **{f"shift by {by} pixel{'s' * (by > 1)}": partial(shift, by=by) for by in (1, 2, 3, 4)},
    **{f"JPEG, quality {quality}": partial(jpeg, quality=quality) for quality in (75, 50)},
    **{f"Gaussian noise, sigma {sigma} of 255": partial(noise, sigma=sigma) for sigma in (5, 10, 20, 40)},
    **{f"brightness x {by}": partial(F.adjust_brightness, brightness_factor=by) for by in (0.5, 0.75, 1.25, 1.5)},
}


def file_names(data: Path) -> list[str]:
    """Return the names of the test images, in the order of `load_images`."""
    split = open_split(data, "test")
    assert isinstance(split, FileSplit)
    return [image.name for image in split.images]


def scores(share: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the scores of `validate` for class probabilities (N, C) and labels (N,)."""
    return {name: round(value, 4) for name, value in asdict(_scores(share.double().log(), labels)).items()}


def evaluate(name: str, data: Path) -> dict[str, object]:
    model = convmixer.create_model(name, pretrained=True, device="cpu")
    classes = convmixer.model_info(name).weights[0].label_names
    images = load_images(data, "test", model.pretrained_cfg["input_size"], classes=classes)
    precisions, shares, fast = {}, {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        precision, calibration = str(dtype).removeprefix("torch."), data if dtype is torch.int8 else None
        fast[precision] = convmixer.optimize(model, backend="native", dtype=dtype, calibration=calibration)
        shares[precision] = class_probabilities(fast[precision], images.pixels)
        precisions[precision] = scores(shares[precision], images.labels)
        print(f"{name}: {precision}: {precisions[precision]}", flush=True)
    share = shares["float32"]
    confidence, predicted = share.max(1)
    pairs = images.labels * len(classes) + predicted
    wrong = (predicted != images.labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    files = file_names(data)
    changed = {}
    for change, make in CHANGES.items():
        right = class_probabilities(fast["bfloat16"], make(images.pixels)).argmax(1) == images.labels
        changed[change] = round(100 * right.double().mean().item(), 4)
        print(f"{name}: {change}: {changed[change]:.2f} %", flush=True)
    return {
        "model": name,
        "images": len(images),
        **{key: value for key, value in harness.machine().items() if key in ("device", "threads", "torch")},
        "precisions": precisions,
        "classes": classes,
        "confusion": pairs.bincount(minlength=len(classes) ** 2).view(len(classes), -1).tolist(),
        "mistakes": [
            {
                "file": files[i],
                "true": classes[images.labels[i]],
                "predicted": classes[predicted[i]],
                "probability": round(confidence[i].item(), 4),
                "probability_of_true": round(share[i, images.labels[i]].item(), 4),
            }
            for i in worst.tolist()
        ],
        "changed": changed,
    }


parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*", default=convmixer.list_pretrained("*.cifar10"), metavar="MODEL")
parser.add_argument("--data", type=Path, default=Path("data/cifar10-png"))
parser.add_argument("--output", type=Path, default=Path("docs/runs"))
args = parser.parse_args()
for name in args.models:
    begun = time.perf_counter()
    result = evaluate(name, args.data)
    folder = args.output / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{folder}/evaluation.json, {time.perf_counter() - begun:.0f} s", flush=True)
