"""Files in and out: round trips, every way in which a file can be wrong, and conversion of old checkpoints."""

import json
import os
import pickle
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from conftest import logits, small
from processes import finish
from safetensors.torch import save_file

import convmixer
from convmixer.errors import WeightsError
from convmixer.factory import open_model
from convmixer.files import write_atomically
from convmixer.hub.checkpoints import read_header, read_metadata, save_weights
from convmixer.hub.convert import convert_checkpoint
from convmixer.runtime.export import export_model
from convmixer.transforms import preprocessing


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    return small()


@pytest.fixture
def file(model, tmp_path):
    """A good file, with the weights of `model`."""
    path = tmp_path / "good.safetensors"
    save_weights(model, path)
    return path


def refuses(model, path, *texts):
    """The error has all the texts, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        convmixer.load_checkpoint(model, path)
    for text in (path.name, *texts):
        assert text in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loaded", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, saved, loaded):
    source, target = small().to(memory_format=saved), small().to(memory_format=loaded)
    assert not torch.equal(logits(source), logits(target))
    save_weights(source, tmp_path / "a.safetensors")
    convmixer.load_checkpoint(target, tmp_path / "a.safetensors")
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor)
    assert target.blocks[0][1].weight.is_contiguous(memory_format=loaded)
    torch.testing.assert_close(logits(target), logits(source), rtol=1e-5, atol=1e-5)


def test_the_file_is_plain_safetensors(model, tmp_path):
    """Read with nothing but the format's definition: a length, a JSON header, little-endian numbers."""
    path = tmp_path / "a.safetensors"
    save_weights(model.to(memory_format=torch.channels_last), str(path), {"note": "text", "labels": ["a", "b"]})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata == {"format": "pt", "note": "text", "labels": '["a", "b"]'} == read_metadata(path)
    assert header.keys() == model.state_dict().keys()
    begin, end = header["stem.0.weight"]["data_offsets"]
    numbers = np.frombuffer(content[8 + length :][begin:end], "<f4").reshape(header["stem.0.weight"]["shape"])
    np.testing.assert_array_equal(numbers, model.stem[0].weight.detach().numpy())


@pytest.mark.slow
def test_equal_weights_make_equal_files(tmp_path):
    """In processes of their own: hashes, and with them the order of sets and maps, differ from one to the next."""
    torch.save({"state_dict": snapshot(convmixer.ConvMixer(256, 8, 5, 2, num_classes=3))}, tmp_path / "old.pth")
    program = """
import hashlib, sys, torch, convmixer
from convmixer.hub.checkpoints import save_weights
torch.manual_seed(0)
names = {f"é{i}": ["\\n", '"', "\x7f", i] for i in range(8)}
save_weights(convmixer.ConvMixer(8, 1, 3, 2, num_classes=3), sys.argv[2] + "/saved.safetensors", names)
convmixer.convert_checkpoint(sys.argv[2] + "/old.pth", sys.argv[2] + "/converted.safetensors")
for name in ("saved", "converted"):
    print(hashlib.sha256(open(f"{sys.argv[2]}/{name}.safetensors", "rb").read()).hexdigest())
"""
    printed = [
        finish([sys.executable, "-c", program, seed, tmp_path], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert printed[0].returncode == 0, printed[0].stderr
    assert printed[0].stdout == printed[1].stdout
    assert read_metadata(tmp_path / "saved.safetensors")["é7"] == json.dumps(["\n", '"', "\x7f", 7])


def test_training_after_a_load_leaves_the_file_alone(model, file):
    """Tensors are mapped from disk: they must be copied into the model, not shared with the file."""
    before = file.read_bytes()
    convmixer.load_checkpoint(model, file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before


def test_names_in_the_header_take_the_place_of_the_old_ones(tmp_path):
    """As they do for `create_model(checkpoint=)`."""
    digits = [f"digit {i}" for i in range(10)]
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    save_weights(model, tmp_path / "w.safetensors", {"label_names": digits, "input_size": [3, 28, 28]})
    opened = convmixer.create_model("convmixer_256_8", checkpoint=tmp_path / "w.safetensors", device="cpu")
    convmixer.load_checkpoint(model, tmp_path / "w.safetensors")
    for one in opened, model:
        assert list(one.pretrained_cfg["label_names"]) == digits
        assert one.pretrained_cfg["input_size"] == (3, 28, 28)
        assert one.pretrained_cfg.get("tag") is None
    save_weights(model, tmp_path / "w.safetensors", {"label_names": digits[:2], "input_size": [1, 24, 24]})
    convmixer.load_checkpoint(model, tmp_path / "w.safetensors")
    assert list(model.pretrained_cfg["label_names"]) == digits
    assert model.pretrained_cfg["input_size"] == (3, 24, 24)
    own = {**model.pretrained_cfg, "label_names": ("a",) * 10}
    model.pretrained_cfg = own
    save_weights(model, tmp_path / "w.safetensors")
    convmixer.load_checkpoint(model, tmp_path / "w.safetensors")
    assert model.pretrained_cfg == own


def test_preprocessing_in_the_header_is_used(tmp_path):
    """Whoever opens the file prepares images as whoever exported it did, whatever form it takes on the way."""
    how = {"mean": (0.5, 0.25, 0.125), "std": (0.5, 1.0, 2.0), "interpolation": "nearest", "crop_mode": "border"}
    how |= {"crop_pct": 0.5, "input_size": (3, 28, 20)}
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    model.pretrained_cfg |= how
    export_model(model, tmp_path / "w.safetensors", format="safetensors")
    convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "v.safetensors")
    convert_checkpoint(tmp_path / "v.safetensors", tmp_path / "folder")
    filled = convmixer.create_model("convmixer_256_8", device="cpu")
    convmixer.load_checkpoint(filled, tmp_path / "v.safetensors")
    opened = convmixer.create_model("convmixer_256_8", checkpoint=tmp_path / "v.safetensors", device="cpu")
    for one in filled, opened, open_model(f"local-dir:{tmp_path}/folder", device="cpu"):
        assert {key: one.pretrained_cfg[key] for key in how} == how
    # Of a model that takes other channels, the sides count.
    grey = convmixer.create_model("convmixer_256_8", checkpoint=tmp_path / "v.safetensors", in_chans=1, device="cpu")
    assert preprocessing(grey)["input_size"] == (1, 28, 20)
    assert preprocessing(grey)["mean"] == pytest.approx((0.875 / 3,))


@pytest.mark.parametrize(
    ("name", "text"),
    [("mean", "[0.5, true, 0.5]"), ("std", "[0, 0, 0]"), ("interpolation", "smooth"), ("mean", "x")],
)
def test_preprocessing_in_the_header_that_makes_no_sense(model, tmp_path, name, text):
    save_weights(model, tmp_path / "w.safetensors", {name: text})
    with pytest.raises(WeightsError, match=r"the header of '.*w.safetensors'") as caught:
        read_header(tmp_path / "w.safetensors")
    assert name in str(caught.value)


def test_values_of_another_type_take_the_type_of_the_model(model, file):
    target = small().bfloat16()
    convmixer.load_checkpoint(target, file)
    assert target.head.weight.dtype == torch.bfloat16
    assert torch.equal(target.head.weight, model.head.weight.bfloat16())


# ---- files that are no good -----------------------------------------------------------------------------------------


def test_missing_file_and_folder(model, tmp_path):
    refuses(model, tmp_path / "none.safetensors", "no weights file at")
    refuses(model, tmp_path, "no weights file at")


@pytest.mark.parametrize("name", ["old.pth", "old.pth.tar", "old.bin", "pytorch_model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle(model, tmp_path, name, zipped):
    torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    refuses(model, tmp_path / name, "is a pickle", "Convert it once: convmixer convert ")


def test_pickle_of_python(model, tmp_path):
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"weights": [1.0]}, protocol=5))
    refuses(model, tmp_path / "old.pkl", "is a pickle", "convmixer convert ", "old.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated(model, file, length):
    content = file.read_bytes()
    length = int(length * len(content)) if isinstance(length, float) else length
    file.write_bytes(content[:length])
    refuses(model, file, "is not a whole safetensors file", f"({len(content[:length])} bytes)", "Fetch it again")


def _header(entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


_TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**20) + b"{}",
        _header(b"{" * 64),
        _header(b"\xff" * 64),
        _header(b"[1, 2, 3]") + bytes(8),
        _header({"a": {**_TENSOR, "dtype": "F99"}}) + bytes(8),
        _header({"a": {**_TENSOR, "shape": [3]}}) + bytes(8),
        _header({"a": {**_TENSOR, "data_offsets": [0, 800]}}) + bytes(8),
        _header({"a": {**_TENSOR, "data_offsets": [8, 0]}}) + bytes(8),
        _header({"a": _TENSOR, "b": _TENSOR}) + bytes(8),
        _header({"a": _TENSOR}) + bytes(80),
        np.random.default_rng(0).bytes(5000),
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["huge length", "long length", "no JSON", "no text", "list", "unknown type", "shape", "past the end",
         "backwards", "overlap", "bytes left over", "random", "web page", "LFS pointer"],
)  # fmt: skip
def test_corrupt(model, tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refuses(model, path, "is not a whole safetensors file", f"({len(content)} bytes)")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem")
def test_a_file_that_cannot_be_read(model):
    """A disk that fails, and a file without permission to read it: reading the first bytes is an OSError."""
    refuses(model, Path("/proc/self/mem"), "cannot read '/proc/self/mem': Input/output error. Check the permissions")
    with pytest.raises(WeightsError, match="cannot read '/proc/self/mem': Input/output error"):
        convmixer.convert_checkpoint("/proc/self/mem", "new")


def test_a_changed_header_is_noticed(model, file):
    """Any one byte of the header's first kilobyte: the file is refused, or says the same."""
    content = bytearray(file.read_bytes())
    for position in range(8, 1000, 61):
        changed = content.copy()
        changed[position] ^= 0x05
        file.write_bytes(changed)
        with pytest.raises(WeightsError):
            convmixer.load_checkpoint(model, file)


def test_foreign_keys(model, tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file({f"layer{i}.weight": torch.zeros(2) for i in range(5)}, path)
    count = len(model.state_dict())
    refuses(
        model,
        path,
        f"{count} missing (stem.0.weight, stem.0.bias, stem.2.weight, ...)",
        "5 unexpected (layer0.weight, layer1.weight, layer2.weight, ...)",
    )


def test_one_missing_and_one_extra_key(model, tmp_path):
    tensors = snapshot(model)
    tensors["neck.bias"] = tensors.pop("blocks.1.3.running_var")
    save_file(tensors, tmp_path / "near.safetensors")
    refuses(model, tmp_path / "near.safetensors", "1 missing (blocks.1.3.running_var)", "1 unexpected (neck.bias)")


def test_wrong_shapes(model, tmp_path):
    path = tmp_path / "shapes.safetensors"
    save_file({**snapshot(model), "head.weight": torch.zeros(5, 8), "head.bias": torch.zeros(5)}, path)
    refuses(model, path, "2 of another shape", "head.weight expected (4, 8), found (5, 8)", "expected (4,), found (5,)")
    assert "missing" not in str(_error(model, path))


def test_another_variant(model, tmp_path):
    save_weights(small(depth=3), tmp_path / "deeper.safetensors")
    expected = "14 unexpected (blocks.2.0.fn.0", "It has dim=8, depth=3, kernel_size=3, patch"
    refuses(model, tmp_path / "deeper.safetensors", *expected)
    save_weights(small(kernel_size=5), tmp_path / "wider.safetensors")
    refuses(model, tmp_path / "wider.safetensors", "blocks.0.0.fn.0.weight expected (8, 1, 3, 3), found (8, 1, 5, 5)")


def _error(model, path):
    with pytest.raises(WeightsError) as caught:
        convmixer.load_checkpoint(model, path)
    return caught.value


@pytest.mark.parametrize("key", ["stem.0.weight", "blocks.1.0.fn.2.running_var", "head.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(model, tmp_path, key, value):
    tensors = snapshot(model)
    tensors[key].view(-1)[:2] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    refuses(model, tmp_path / "bad.safetensors", f"{key} has 2 of {tensors[key].numel()} values that are not finite")


def test_infinities_that_cancel_are_seen(model, tmp_path):
    tensors = snapshot(model)
    tensors["head.bias"][:] = torch.tensor([float("inf"), float("-inf"), 0, 0])
    save_file(tensors, tmp_path / "bad.safetensors")
    refuses(model, tmp_path / "bad.safetensors", "head.bias has 2 of 4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_values_are_no_error(dtype, tmp_path):
    """Their sum overflows; they are finite all the same."""
    model = small().to(dtype)
    with torch.no_grad():
        model.head.weight.fill_(torch.finfo(dtype).max)
    save_weights(model, tmp_path / "large.safetensors")
    target = small().to(dtype)
    convmixer.load_checkpoint(target, tmp_path / "large.safetensors")
    assert torch.equal(target.head.weight, model.head.weight)


def test_float8_values_are_checked_like_others(model, tmp_path):
    """The type that PyTorch cannot add up."""
    path = tmp_path / "eight.safetensors"
    save_file({"scale": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    refuses(model, path, "1 unexpected (scale)")


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_first_write_leaves_nothing(tmp_path):
    def fail(temporary):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", fail)
    assert os.listdir(tmp_path) == []


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary):
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomically(str(path), write)
    assert seen == ["old"]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_writing_leaves_the_umask_of_other_threads(tmp_path, monkeypatch):
    """It belongs to the process: files that others create meanwhile would be open to all users."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("new"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(model, tmp_path, umask, mode):
    path = tmp_path / "a.safetensors"
    before = os.umask(umask)
    try:
        save_weights(model, path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_saving_replaces_a_file_that_is_open_elsewhere(model, file):
    """A reader that has the old file mapped keeps reading the old one."""
    with safetensors.safe_open(file, framework="pt") as reader:
        old = model.head.weight.detach().clone()
        save_weights(small(), file)
        assert torch.equal(reader.get_tensor("head.weight"), old)
