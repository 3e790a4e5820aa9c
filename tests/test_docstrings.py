"""Every public function has an example in its docstring, which runs and prints what it says."""

import doctest
import importlib
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch

import convmixer
from convmixer.hub import client, verify

ROOT = Path(__file__).parent.parent
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
NAMES = {f"convmixer.{name}" for name in set(convmixer.__all__) - {"ConvMixerError"}}
NAMES |= set(re.findall(r"autofunction:: (\S+)", PAGES))


@pytest.fixture
def _here(tmp_path, monkeypatch):
    """A folder with all that the examples name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "images" / "cat.png", tmp_path)
    for split, count in (("train", 10), ("test", 3)):
        for flower, color in (("daisy", "white"), ("rose", "red")):
            folder = Path("data/flowers", split, flower)
            folder.mkdir(parents=True)
            for i in range(count):
                PIL.Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")


@pytest.mark.usefixtures("_here", "no_curves")
@pytest.mark.parametrize("name", sorted(NAMES))
def test_example(name, monkeypatch):
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(verify, "LIBRARIES", {"convmixer": verify.with_convmixer})  # others are tested elsewhere
    module, _, function = name.rpartition(".")
    names = {"PIL": PIL, "convmixer": convmixer, "timm": timm, "torch": torch}
    found = getattr(importlib.import_module(module), function)
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
