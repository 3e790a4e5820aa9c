"""The examples in the docstrings of public functions run, and print what they say."""

import doctest
import shutil
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch

import convmixer
from convmixer.hub import client, verify

ROOT = Path(__file__).parent.parent
WITHOUT = {"ConvMixerError", "export_model", "optimize"}  # pages of the documentation show the last two


@pytest.mark.parametrize("name", sorted(set(convmixer.__all__) - WITHOUT))
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(verify, "LIBRARIES", {"convmixer": verify.with_convmixer})  # others are tested elsewhere
    shutil.copy(ROOT / "examples" / "images" / "cat.png", tmp_path)
    names = {"PIL": PIL, "convmixer": convmixer, "timm": timm, "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(convmixer, name), name, globs=names)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)
