"""PyTorch's default type, which a program may set for its own tensors, changes no answer; nor does its default device.

Only torchvision, which turns images into tensors of the default type, rounds pixels to it.
"""

import contextlib

import pytest
import torch
from conftest import SMALL_MODEL, write_digits
from runtimes import HAS_NATIVE, NO_NATIVE

import convmixer
from convmixer import plots
from convmixer.data.memory import load_images
from convmixer.errors import ArgumentError
from convmixer.evaluation import validate
from convmixer.hub.verify import verify
from convmixer.inference import label_names
from convmixer.pyramid import FeaturePyramid
from convmixer.training import evaluate, get_recipe, train
from convmixer.training.precision import flush_denormals

NATIVE = pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
CLASSES = ("digit 0", "digit 1", "digit 2", "digit 3")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 300, 60, CLASSES)


@contextlib.contextmanager
def default_type(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_files_and_settings(dtype, tmp_path, cat):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    convmixer.save_pretrained(model, tmp_path / "folder")
    with default_type(dtype):
        convmixer.convert_checkpoint(tmp_path / "weights.pth", tmp_path / "weights.safetensors")
        with pytest.raises(ArgumentError, match=r"default type is torch\..*: call torch\.set_default_dtype"):
            verify(tmp_path / "folder", model, label_names(model))
        plots.class_activation(model, cat)
        for before in False, True:
            torch.set_flush_denormal(before)
            with flush_denormals(torch.device("cpu")):
                assert float(torch.tensor(1e-40, dtype=torch.float32)) == 0
            assert (float(torch.tensor(1e-40, dtype=torch.float32)) == 0) is before
    torch.set_flush_denormal(False)


TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)


@TYPES
@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=NATIVE)])
def test_backends(dtype, backend):
    model = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu").eval()
    images = torch.rand(4, 3, 32, 32)
    for features in (False, True):
        if features:
            model.reset_classifier(0)
        expected = convmixer.optimize(model, backend=backend)(images)
        with default_type(dtype):
            found = convmixer.optimize(model, backend=backend)(images)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@NATIVE
def test_native_computes_on_the_cpu_whatever_the_default_device_is():
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu").eval()
    images = torch.rand(4, 3, 32, 32)
    fast = convmixer.optimize(model, backend="native")
    expected = fast(images)
    with torch.device("meta"):  # stands for a GPU
        assert torch.equal(fast(images), expected)


@TYPES
def test_predictions_and_scores(digits, dtype):
    model = convmixer.create_model("convmixer_256_8", num_classes=4, device="cpu", dim=32, depth=2)
    files = [str(file) for file in sorted((digits / "test" / "digit 1").iterdir())[:3]]
    images = load_images(digits, "test", (3, 32, 32), report=lambda line: None)
    scores, measured = evaluate(model, images), validate(model, digits, classes=CLASSES)
    answers = convmixer.predict(model, files)
    with default_type(dtype):
        assert evaluate(model, images) == scores
        found = validate(model, digits, classes=CLASSES)
        for name in ("top1", "loss", "calibration_error"):
            assert getattr(found, name) == pytest.approx(getattr(measured, name), abs=1e-3)
        for found, wanted in zip(convmixer.predict(model, files), answers, strict=True):
            assert found == [(label, pytest.approx(p, abs=2e-3)) for label, p in wanted]


@TYPES
def test_pyramid(dtype):
    model = convmixer.create_model(
        "convmixer_768_32", device="cpu", dim=8, depth=2, features_only=True, out_indices=(0, 1)
    )
    pyramid = FeaturePyramid(model, (4, 8, 16)).eval()
    images = torch.rand(1, 3, 2100, 70)
    expected = pyramid(images)
    with default_type(dtype):
        assert all(torch.equal(a, b) for a, b in zip(pyramid(images), expected, strict=True))


@TYPES
def test_training(digits, tmp_path, dtype):
    fields = {"rand_augment": (2, 9), "crop_scale": 0.5, "mixup": 0.2, "cutmix": 0.5, "shift": 2, "random_erasing": 0.5}
    fields |= {"class_weights": (1, 2, 1, 3), "ema_decay": 0.9, "color_jitter": 0.2}
    recipe = get_recipe("cifar10", **{"epochs": 2, "batch_size": 32, **SMALL_MODEL, **fields})
    whole = train(recipe, digits, tmp_path / "whole", device="cpu", report=lambda line: None)
    with default_type(dtype):
        other = train(recipe, digits, tmp_path / "other", device="cpu", report=lambda line: None)
    for a, b in zip(other.history, whole.history, strict=True):
        assert (a.train_loss, a.train_accuracy) == (b.train_loss, b.train_accuracy)
        assert (a.validation_loss, a.validation_accuracy) == (b.validation_loss, b.validation_accuracy)
    assert list(other.test_accuracy.values()) == list(whole.test_accuracy.values())
    tensors = whole.model.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in other.model.state_dict().items())
