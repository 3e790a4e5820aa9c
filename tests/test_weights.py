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


@pytest.mark.slow
def test_accuracy_is_what_the_registry_says(model, data_folder):
    """On the JPEG images; test_evaluation.py has the lossless ones."""
    labels = model.pretrained_cfg["label_names"]
    images = load_images(data_folder / "cifar10-jpeg", "test", (3, 32, 32), classes=labels)
    top1 = evaluate(model, images)["top1"]
    assert top1 == pytest.approx(convmixer.model_info(NAME).weights[0].metrics[0].value, abs=0.1)
