"""`convmixer info`."""

import re

import pytest
from command import records, run

import convmixer

pytestmark = pytest.mark.usefixtures("wide_terminal")


def test_info():
    text = run("info", "convmixer_768_32").stdout
    for text_part in ("768 / 32", "7 / 7", "relu", "21,110,248", "3x224x224", "bicubic", "MIT", "80.16 %"):
        assert text_part in text
    assert "hf-hub:timm/convmixer_768_32.in1k/model.safetensors@main" in text


def test_info_for_programs():
    (listed,) = records("list", "convmixer_256_8", "--json")
    record = records("info", "convmixer_256_8", "--json")
    assert record == listed
    assert record["mean"] == [0.4914, 0.4822, 0.4465]
    (weights,) = records("info", "convmixer_256_8.cifar10", "--json")["weights"]
    assert weights["source"] == "package"
    assert "top-1" in {m["name"] for m in weights["metrics"]}


def test_info_of_a_model_without_weights():
    assert "No public weights are known" in run("info", "convmixer_512_12").stdout
    assert records("info", "convmixer_512_12", "--json")["weights"] == []


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch):
    """A checksum or a name that lost its end is of no use."""
    monkeypatch.setenv("COLUMNS", "40")
    checksum = convmixer.model_info("convmixer_256_8.cifar10").weights[0].sha256
    text = run("info", "convmixer_256_8").stdout
    assert checksum in re.sub(r"\s+", "", text)
    monkeypatch.setenv("COLUMNS", "80")
    assert all(name in run("list").stdout for name in convmixer.list_models())
