"""Shared fixtures, and what several test files build with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageDraw
from torch import nn

import convmixer

ROOT = Path(__file__).parent.parent

# Fields of a recipe whose epoch takes less than a second.
SMALL_MODEL = {
    "model": "convmixer_128_8_ks7_p2",
    "model_args": (("dim", 16), ("depth", 2)),
    "input_size": (8, 8),
    "rand_augment": (0, 0),
}

# The processes of `pytest -n` share the cores, and so do the programs that they start.
_THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(_THREADS)
os.environ["OMP_NUM_THREADS"] = str(_THREADS)
torch.backends.cudnn.allow_tf32 = False  # what a GPU computes is compared with float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """A folder of photographs, each named after what it shows."""
    return ROOT / "examples" / "images"


@pytest.fixture
def cat(photographs: Path) -> Path:
    """A photograph of a cat."""
    return photographs / "cat.png"


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A photograph, uint8 (H, W, 3)."""
    return skimage.data.astronaut()


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no table is folded."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def arrow() -> Image.Image:
    """A small image without any symmetry."""
    image = Image.new("RGB", (9, 6), "navy")
    draw = ImageDraw.Draw(image)
    draw.line((0, 5, 7, 1), "yellow")
    draw.rectangle((6, 0, 8, 1), "red")
    image.putpixel((0, 0), (0, 255, 0))
    return image


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """A folder with CIFAR-10's images in `cifar10-png`, where this machine has them."""
    folder = os.environ.get("CONVMIXER_TEST_DATA")
    if not folder:
        pytest.skip("CONVMIXER_TEST_DATA does not name a folder with cifar10-png/")
    return Path(folder)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws no curves, which take half a second."""
    from convmixer.training import run

    monkeypatch.setattr(run, "write_figure", lambda _, path: path.touch())
    monkeypatch.setattr(run, "plot_history", lambda _: None)


def small(**changes: Any) -> convmixer.ConvMixer:
    """A ConvMixer of 8 channels and two blocks whose parameters are not the initial ones."""
    sizes = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 2, "num_classes": 4}
    return shake(convmixer.ConvMixer(**sizes | changes))


@torch.no_grad()
def logits(model: nn.Module, size: int = 28) -> torch.Tensor:
    """Of two images that are no noise, (2, 3, size, size)."""
    return model(torch.linspace(-2, 2, 2 * 3 * size * size).view(2, 3, size, size))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU skip where there is none, unless Triton's interpreter takes its place."""
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def vary_norms(
    model: nn.Module,
    std: float = 0.1,
    variance: tuple[float, float] = (0.5, 1.5),
    scale: tuple[float, float] = (-1.0, 1.5),
) -> None:
    """Give each BatchNorm statistics and parameters that are not the initial ones; `std` of means and biases."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=std)
            nn.init.uniform_(module.running_var, *variance)
            nn.init.uniform_(module.weight, *scale)
            nn.init.normal_(module.bias, std=std)


def shake(model: nn.Module) -> nn.Module:
    """Statistics and scales of its own for each BatchNorm, as fresh ones would hide keys that are mixed up."""
    vary_norms(model, scale=(0.5, 1.5))
    return model.eval()


def write_digits(root: Path, train: int, test: int, names: Sequence[str]) -> Path:
    """Handwritten digits as PNG files in a folder for each split and class; `names` are those of the digits from 0."""
    from sklearn.datasets import load_digits  # takes a second

    bunch = load_digits(n_class=len(names))
    for i, (pixels, label) in enumerate(zip(bunch.images[: train + test], bunch.target, strict=False)):
        folder = root / ("train" if i < train else "test") / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB").save(folder / f"{i:04}.png")
    return root


def loss_after_200_steps(model: nn.Module, *, bfloat16: bool) -> float:
    """Train on grey digits of 8 x 8 pixels; the mean loss over the last pass over the images."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images[:1024]).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target[:1024])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(200):
        chosen = torch.arange(step * 32, step * 32 + 32) % len(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = nn.functional.cross_entropy(model(images[chosen]).float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-32:]) / 32
