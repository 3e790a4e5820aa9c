"""The program itself: its commands, their help, and how it is started."""

import importlib.metadata
import re
import runpy
import sys

import pytest
import torch
from command import run

from convmixer.cli import main

pytestmark = pytest.mark.usefixtures("wide_terminal")


def test_help_names_every_command():
    text = run("--help").stdout
    for name in ("list", "info", "predict", "train", "push", "convert", "export", "plot"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    assert run("-h").stdout == text


@pytest.mark.parametrize("name", main.commands)
def test_help_of_every_command(name):
    text = run(name, "--help").stdout
    assert text.startswith(f"Usage: main {name}")
    assert re.search(r"^  \w.+\.$", text, re.MULTILINE)  # it says what it does


def test_version():
    assert run("--version").stdout.strip().endswith(importlib.metadata.version("convmixer"))


def test_unknown_command():
    assert "No such command 'classify'" in run("classify", status=2).stderr


def test_as_a_module(monkeypatch, capsys):
    """What `python -m convmixer` does; in a process of its own it trains in test_training.py."""
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("convmixer", run_name="__main__")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Usage: convmixer" in shown.out
    assert "predict" in shown.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("info", "convmixer_256_9"), r"error: unknown model 'convmixer_256_9'; did you mean convmixer_256_8 or "),
        (("info", "resnet"), r"error: unknown model 'resnet'; valid: convmixer_1024_12, "),
        (("info", "convmixer_256_8.in1k"), r"has no weights 'in1k'; valid: convmixer_256_8\.cifar10"),
        (("predict", "x.png", "--model", "convmixer_768_31"), r"did you mean convmixer_768_32"),
        (("predict", "x.png", "--model", "convmixer_512_12"), r"convmixer_512_12 has no weights"),
    ],
)
def test_unknown_models(cat, arguments, text):
    result = run(*(cat if a == "x.png" else a for a in arguments), status=2)
    assert re.search(text, result.stderr)
    assert result.stdout == ""


def test_float32_is_float32_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as PyTorch has it
    run("list")
    assert not torch.backends.cudnn.allow_tf32
