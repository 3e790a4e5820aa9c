"""The weights that ship: real accuracy, real photographs, and outputs that may not drift."""

import json
from pathlib import Path

import pytest
import torch

import convmixer
from convmixer.training import evaluate
from convmixer.training.data import load_images

NAME = "convmixer_256_8.cifar10"
REFERENCE = Path(__file__).parent / "reference_logits.json"


@pytest.fixture(scope="module")
def model():
    return convmixer.create_model(NAME, pretrained=True, device="cpu").eval()


def test_a_cat_is_a_cat(model, cat):
    (label, probability), *_ = convmixer.predict(model, cat)
    assert label == "cat"
    assert probability > 0.5


def test_reference_logits(model):
    x = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.inference_mode():
        logits = model(x)[0]
    expected = torch.tensor(json.loads(REFERENCE.read_text())[NAME])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("folder", "metric"),
    [
        pytest.param("cifar10-jpeg", 0, marks=pytest.mark.slow, id="JPEG"),
        pytest.param("cifar10-png-subset", 1, id="lossless"),
    ],
)
def test_accuracy_is_what_the_registry_says(model, data_folder, folder, metric):
    images = load_images(data_folder / folder, "test", (3, 32, 32), classes=model.pretrained_cfg["label_names"])
    top1 = evaluate(model, images)["top1"]
    assert top1 == pytest.approx(convmixer.model_info(NAME).weights[0].metrics[metric].value, abs=0.1)
