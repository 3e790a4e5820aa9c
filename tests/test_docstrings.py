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
CLASSES = sorted(set(re.findall(r"autoclass:: (\S+)", PAGES)))


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


def run(name, *, methods):
    """Run the examples of a public name; return how many there are."""
    module, _, last = name.rpartition(".")
    names = {"PIL": PIL, "convmixer": convmixer, "timm": timm, "torch": torch}
    found = getattr(importlib.import_module(module), last)
    said: list[str] = []
    tests = doctest.DocTestFinder(recurse=methods).find(found, name, globs=names)
    for test in tests:
        doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
    return sum(len(test.examples) for test in tests)


@pytest.mark.usefixtures("_here", "no_curves")
@pytest.mark.parametrize("name", sorted(NAMES))
def test_example(name, monkeypatch):
    if name == "convmixer.demo.write_space":
        pytest.importorskip("gradio")
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(verify, "LIBRARIES", {"convmixer": verify.with_convmixer})  # others are tested elsewhere
    assert run(name, methods=False)


@pytest.mark.usefixtures("_here")
def test_examples_of_classes_and_methods():
    counts = {name: run(name, methods=True) for name in CLASSES}
    assert counts["convmixer.ConvMixer"] > 10
    assert counts["convmixer.runtime.folding.FoldedConvMixer"]
    assert counts["convmixer.runtime.optimized_model.OptimizedConvMixer"]
