"""`convmixer list`."""

import pytest
from command import records, run

import convmixer

pytestmark = pytest.mark.usefixtures("wide_terminal")


def test_list():
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == ["model", "input", "params", "MACs", "weights", "top-1"]
    assert {line.split()[0] for line in lines[1:]} >= set(convmixer.list_models())
    big = next(line for line in lines if "convmixer_1536_20" in line)
    assert big.split() == ["convmixer_1536_20", "224", "51.63", "M", "51.10", "G", "in1k", "(Hub)", "81.37"]


def test_list_by_pattern():
    assert [r["name"] for r in records("list", "convmixer_256*", "--json")] == [
        "convmixer_256_8",
        "convmixer_256_8_ks9_p1",
    ]
    text = run("list", "convmixer_256*").stdout
    assert "convmixer_256_8_ks9_p1" in text
    assert "convmixer_768_32" not in text
    assert records("list", "resnet*", "--json") == []


def test_list_of_what_has_weights():
    found = records("list", "--pretrained", "--json")
    assert [r["name"] for r in found] == convmixer.list_models(pretrained=True)
    names = [f"{r['name']}.{w['tag']}" for r in found for w in r["weights"]]
    assert sorted(names) == convmixer.list_pretrained()
    assert "convmixer_512_12" not in run("list", "--pretrained").stdout


def test_list_for_programs():
    found = {r["name"]: r for r in records("list", "--json")}
    assert set(found) == set(convmixer.list_models())
    for name, record in found.items():
        model = convmixer.create_model(name, device="meta")
        assert record["parameters"] == sum(p.numel() for p in model.parameters())
        assert record["input_size"] == list(model.pretrained_cfg["input_size"])
    # 16 x 16 patches: the stem, eight blocks of a depthwise and a pointwise convolution, the head
    assert found["convmixer_256_8"]["macs"] == 256 * (12 * 256 + 8 * (25 * 256 + 256 * 256)) + 256 * 10
