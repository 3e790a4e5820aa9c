"""The whole way of a user: fine-tune the shipped weights to digits, be killed, resume, validate, export, load."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import timm
import torch
from command import run
from PIL import Image
from processes import started, wait_for
from sklearn.datasets import load_digits

import convmixer

# Grey images of 16x16 pixels; a mirrored digit is another sign, so nothing is flipped.
SETTINGS = {"in_chans": 1, "input_size": "[16, 16]", "flip": 0, "shift": 1, "epochs": 12, "lr": 0.004}


@pytest.fixture
def digits(tmp_path):
    """scikit-learn's 1,797 digits; every fourth is for the test."""
    bunch = load_digits()
    for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        folder = tmp_path / "digits" / ("test" if i % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{i:04}.png")
    return tmp_path / "digits"


@pytest.mark.slow
def test_digits(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "finetune", "--data", digits, "--output", "run", "--device", "cpu"]
    for name, value in SETTINGS.items():
        train += ["--set", f"{name}={value}"]
    log = tmp_path / "run" / "metrics.csv"
    with started([sys.executable, "-m", "convmixer", *train]) as process:
        wait_for(process, log, rows=2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    run(*train, "--resume")

    found = json.loads(run("validate", "run", "--data", digits, "--device", "cpu", "--json").stdout)
    assert found["count"] == 450
    assert found["top1"] > 98

    run("export", "run", "--format", "hub", "--output", "published")
    run("export", "run", "--format", "onnx", "--output", "digits.onnx")
    model = convmixer.create_model("local-dir:published", pretrained=True, device="cpu").eval()
    x = torch.randn(3, 1, 16, 16)
    with torch.inference_mode():
        logits = model(x)
        theirs = timm.create_model("local-dir:published", pretrained=True).eval()(x)
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
    import onnxruntime

    session = onnxruntime.InferenceSession("digits.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(result, logits, atol=1e-4 * float(logits.abs().max()))
    seven = min((digits / "test" / "7").iterdir(), key=os.fspath)
    assert convmixer.predict(model, seven)[0][0] == "7"
