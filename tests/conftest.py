"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cat() -> Path:
    """A photograph of a cat."""
    return ROOT / "examples" / "images" / "cat.png"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real CIFAR-10 images, where this machine has them."""
    folder = os.environ.get("CONVMIXER_TEST_DATA")
    if not folder:
        pytest.skip("CONVMIXER_TEST_DATA does not name a folder with cifar10-jpeg/ and cifar10-png-subset/")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
