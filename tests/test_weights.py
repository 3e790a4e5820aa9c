"""The weights that ship: real accuracy, real photographs, and outputs that may not drift."""

import json
from pathlib import Path

import pytest
import torch

import convmixer
from convmixer.evaluation import validate
from convmixer.runtime.choose import available_backends

REFERENCE = json.loads((Path(__file__).parent / "reference_logits.json").read_text())
SMALL, MIDDLE, LARGE = (f"convmixer_{name}.cifar10" for name in ("128_8_ks7_p2", "256_8", "256_8_ks9_p1"))
RIGHT = {LARGE: 9508, MIDDLE: 9568, SMALL: 9387}  # of the 10,000 test images, in float32


def load(name):
    return convmixer.create_model(name, pretrained=True, device="cpu").eval()


def recorded(name):
    return {metric.name: metric.value for metric in convmixer.model_info(name).weights[0].metrics}


def test_all_sets_are_tested():
    assert set(RIGHT) == {name for name in convmixer.list_pretrained() if convmixer.model_info(name).weights[0].path}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("file", ["cat.png", "dog.jpg", "airplane.jpg"])
def test_photographs(name, file, photographs):
    (label, _), *_ = convmixer.predict(load(name), photographs / file)
    assert label == file.split(".")[0]


@pytest.mark.parametrize("name", RIGHT)
def test_reference_logits(name):
    """Computed once in float64."""
    x = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.inference_mode():
        logits = load(name)(x)[0]
    torch.testing.assert_close(logits, torch.tensor(REFERENCE[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in (LARGE, MIDDLE)), SMALL])
def test_accuracy_is_what_the_registry_says(name, data_folder):
    found = validate(convmixer.optimize(load(name), backend="auto"), data_folder / "cifar10-png")
    assert found.count == 10_000
    assert round(found.top1 * 100) == RIGHT[name] == round(recorded(name)["top-1"] * 100)
    assert found.top5 == pytest.approx(recorded(name)["top-5"], abs=0.005)
    assert found.calibration_error == pytest.approx(recorded(name)["calibration error"], abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif("native" not in available_backends("cpu", torch.int8), reason="needs AMX, AVX512-VBMI, a compiler")
@pytest.mark.parametrize("name", [SMALL, MIDDLE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_accuracy_in_fewer_bits(name, dtype, data_folder):
    data = data_folder / "cifar10-png"
    calibration = data if dtype is torch.int8 else None
    fast = convmixer.optimize(load(name), backend="native", dtype=dtype, calibration=calibration)
    precision = str(dtype).removeprefix("torch.")
    assert validate(fast, data).top1 == pytest.approx(recorded(name)[f"top-1 in {precision}"], abs=0.05)
