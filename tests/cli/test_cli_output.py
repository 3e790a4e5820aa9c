"""Where output goes: folders that take no files, and consoles that lack a character."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import run
from PIL import Image
from processes import finish

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, WriteError
from convmixer.files import check_writable, write_atomically
from convmixer.hub.checkpoints import save_weights

NAMES = ["кошка", "猫", "Löwe"]


@pytest.fixture
def weights(tmp_path):
    """A small file of three classes, whose names no Western console knows."""
    model = convmixer.create_model("convmixer_256_8", num_classes=3, device="cpu")
    save_weights(model, tmp_path / "m.safetensors", {"label_names": NAMES})
    return tmp_path / "m.safetensors"


@pytest.fixture
def data(cat, tmp_path):
    for name in NAMES[:2]:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        shutil.copy(cat, tmp_path / "data" / "test" / name / "猫.png")
    return tmp_path / "data"


def in_western_console(*arguments):
    words = [sys.executable, "-m", "convmixer", *arguments]
    return finish(words, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, encoding="cp1252", timeout=900)


# ---- places that take no files --------------------------------------------------------------------------------------

UNWRITABLE = "/proc/self"  # for root, too: its file system makes no files


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_unwritable_folders(tmp_path, weights, data):
    """Each command says so before it computes, and names the folder."""
    torch.save(convmixer.create_model("convmixer_256_8", device="cpu").state_dict(), tmp_path / "m.pth")
    place = f"in the folder {UNWRITABLE!r}: "
    for arguments in (
        ("export", weights, "--format", "safetensors", "--output", f"{UNWRITABLE}/m.safetensors"),
        ("export", weights, "--format", "torch-export", "--output", f"{UNWRITABLE}/m.pt2"),
        ("convert", tmp_path / "m.pth", f"{UNWRITABLE}/m.safetensors"),
        ("validate", weights, "--data", tmp_path / "none", "--output", f"{UNWRITABLE}/m.json"),
        ("bench", weights, "--json", f"{UNWRITABLE}/m.json"),
        ("bench", weights, "--plot", f"{UNWRITABLE}/m.png"),
    ):
        error = " ".join(run(*arguments, status=2).stderr.split())
        assert place in error
        assert error.endswith("Choose another")
    missing = f"there is no folder {str(tmp_path / 'none')!r}"
    assert missing in run("validate", weights, "--data", data, "--output", tmp_path / "none" / "x", status=2).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("command", [("list",), ("info", "convmixer_256_8"), ("info", "convmixer_256_8", "--json")])
def test_output_to_a_disk_that_is_full(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convmixer", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_a_disk_that_is_full(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")

    def fail(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        WriteError, match=r"cannot write .*file': No space left on device\. The file that was there is unchanged"
    ) as raised:
        write_atomically(file, fail)
    assert isinstance(raised.value, ConvMixerError)
    assert isinstance(raised.value, OSError)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    "command",
    [
        ("export", "convmixer_128_8_ks7_p2", "--format", "torch-export", "--output", "model.pt2"),
        ("export", "convmixer_128_8_ks7_p2", "--format", "safetensors", "--output", "model.safetensors"),
        ("convert", "weights.pth", "model.safetensors", "--variant", "convmixer_128_8_ks7_p2"),
        ("convert", "weights.pth", "folder", "--variant", "convmixer_128_8_ks7_p2"),
    ],
)
def test_weights_on_a_disk_that_is_full(tmp_path, command):
    pytest.importorskip("resource", reason="limits of file size are POSIX")
    model = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import convmixer.cli; convmixer.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode in (1, 2), done.stderr
    assert "too large" in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_checking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match=r"in the folder .*: File name too long"):
        check_writable(tmp_path / ("x" * 300))
    with pytest.raises(ArgumentError, match="it is a folder"):
        check_writable(tmp_path)


# ---- consoles -------------------------------------------------------------------------------------------------------


def test_predict(weights, data):
    done = in_western_console("predict", str(data), "--checkpoint", weights, "--model", "convmixer_256_8")
    assert done.returncode == 0, done.stderr
    for name in ("\\u732b.png", "\\u043a\\u043e\\u0448\\u043a\\u0430", "Löwe"):
        assert name in done.stdout
    (data / "test" / NAMES[1] / "猫.png").write_bytes(b"no image")
    done = in_western_console("predict", str(data), "--checkpoint", weights, "--model", "convmixer_256_8", "--json")
    assert done.returncode == 1
    assert "\\u732b.png" in done.stderr
    assert json.loads(done.stdout)[0]["image"].endswith("猫.png")


def test_validate_writes_before_it_prints(weights, data, tmp_path):
    done = in_western_console("validate", str(weights), "--data", str(data), "--output", str(tmp_path / "猫.json"))
    assert done.returncode == 0, done.stderr
    assert "\\u043a\\u043e\\u0448\\u043a\\u0430" in done.stdout
    record = json.loads((tmp_path / "猫.json").read_text())
    assert [row["label"] for row in record["classes"]] == NAMES[:2]


def test_the_console_is_left_as_it_was(capsys):
    before = sys.stdout.errors
    run("list")
    assert sys.stdout.errors == before


# ---- precision ------------------------------------------------------------------------------------------------------


def test_float16_with_a_backend(weights, data):
    if torch.cuda.is_available():
        pytest.skip("there it is possible")
    for further in ((), ("--backend", "eager"), ("--backend", "auto")):
        result = run(
            "validate", weights, "--data", data, "--precision", "float16", *further, "--device", "cpu", status=2
        )
        assert "precision 'float16' needs a GPU, not 'cpu'; valid: auto, float32, bfloat16" in result.stderr


@pytest.mark.gpu
def test_float16_with_a_backend_on_a_gpu(weights, data):
    result = run(
        "validate", weights, "--data", data, "--precision", "float16", "--backend", "eager", "--device", "cuda"
    )
    assert "top-1 changed by" in result.stdout


def test_each_precision_reaches_the_optimized_model(weights, cat, data):
    for precision in ("bfloat16", "auto"):
        Image.open(cat).save(data / "test" / NAMES[0] / "b.png")
        options = ("--precision", precision, "--backend", "eager", "--device", "cpu", "--json")
        record = json.loads(run("validate", weights, "--data", data, *options).stdout)
        assert record["optimized"]["loss"] == pytest.approx(record["loss"], rel=0.05)
