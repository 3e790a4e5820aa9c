"""Models with one output tell two classes apart by a sigmoid, as binary classifiers are trained."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import convmixer
from convmixer import plots
from convmixer.data.memory import load_images
from convmixer.errors import ArgumentError
from convmixer.evaluation import validate
from convmixer.hub.verify import verify
from convmixer.inference import label_names
from convmixer.training import evaluate


@pytest.fixture
def model():
    options = {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 2, "num_classes": 1, "device": "cpu"}
    made = convmixer.create_model("convmixer_256_8", **options).eval()
    torch.nn.init.normal_(made.head.weight, std=2)
    return made


@pytest.fixture
def folder(tmp_path):
    """Noise of two classes."""
    generator = np.random.default_rng(0)
    for i in range(8):
        file = tmp_path / "data" / "test" / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return tmp_path / "data"


def logit(model, image):
    with torch.no_grad():
        return model(convmixer.create_transform(model)(image.convert("RGB"))[None])[0, 0]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ("class 0", "class 1")),
        (["cat"], ("not cat", "cat")),
        (["dog", "cat"], ("dog", "cat")),
        (["a", "b", "c"], ("class 0", "class 1")),
    ],
)
def test_predict(model, cat, given, names):
    model.pretrained_cfg["label_names"] = given
    assert label_names(model) == names
    p = torch.sigmoid(logit(model, Image.open(cat))).item()
    assert 0.01 < p < 0.99
    found = convmixer.predict(model, cat)
    assert found == sorted(found, key=lambda pair: -pair[1])
    assert dict(found) == pytest.approx({names[0]: 1 - p, names[1]: p}, abs=1e-6)
    assert convmixer.predict(model, cat, topk=1) == found[:1]
    assert convmixer.predict(convmixer.optimize(model), cat) == [(n, pytest.approx(p, abs=1e-5)) for n, p in found]


def test_measures(model, folder):
    """The loss is binary cross entropy; right is a positive logit for the second class, and a negative one else."""
    model.pretrained_cfg["label_names"] = ("dog", "cat")
    files = sorted(folder.glob("test/*/*.png"))
    logits = torch.stack([logit(model, Image.open(file)) for file in files])
    truth = torch.tensor([file.parent.name == "cat" for file in files]).float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth).item()
    top1 = 100 * ((logits > 0) == truth.bool()).float().mean().item()
    assert 0 < top1 < 100
    for options in ({}, {"classes": ["dog", "cat"]}):
        found = validate(model, folder, **options)
        assert (found.loss, found.top1, found.top5) == (pytest.approx(loss, rel=1e-5), pytest.approx(top1), 100)
    assert {row.label for row in found.classes} == {"dog", "cat"}
    data = load_images(folder, "test", (3, 32, 32), classes=("dog", "cat"))
    assert evaluate(model, data)["loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluate(model, data)["top1"] == pytest.approx(top1)
    probabilities = plots.class_probabilities(model, data.pixels)
    assert torch.allclose(probabilities[:, 1].sort().values, torch.sigmoid(logits).sort().values, atol=1e-6)
    assert torch.allclose(probabilities.sum(1), torch.ones(8))
    plots.plot_mistakes(data.pixels, data.labels, probabilities, data.classes)
    with pytest.raises(ArgumentError, match="1 class names for a model with 2 classes"):
        validate(model, folder, classes=["cat"])


def test_class_activation(model, cat):
    """What supports one class counts against the other."""
    model.pretrained_cfg["label_names"] = ["cat"]
    figures = [plots.plot_class_activation(model, cat, target=target) for target in (0, 1)]
    titles = [figure.axes[1].get_title() for figure in figures]
    assert [title.split(",")[0] for title in titles] == ["activation for not cat", "activation for cat"]
    maps = [figure.axes[1].images[-1].get_array() for figure in figures]
    assert any(map.max() > 0 for map in maps)
    assert not np.allclose(*maps)
    with pytest.raises(ArgumentError, match="target=2: give the index of a class, 0 to 1"):
        plots.plot_class_activation(model, cat, target=2)


@pytest.mark.parametrize("given", [["cat"], ["dog", "cat"]])
def test_published(model, cat, tmp_path, given):
    convmixer.save_pretrained(model, tmp_path / "hub", label_names=given, licence="mit")
    names = tuple(given) if len(given) == 2 else ("not cat", "cat")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["label_names"] == ["cat"]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "knows 2 classes." in card
    assert "It has one output, whose sigmoid is the probability of cat." in card
    assert f"Classes: {names[0]}, cat." in card
    again = convmixer.create_model(f"local-dir:{tmp_path}/hub", pretrained=True, device="cpu")
    assert label_names(again) == names
    model.pretrained_cfg["label_names"] = given
    assert convmixer.predict(again, cat) == convmixer.predict(model, cat)
    theirs = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True)
    assert theirs.pretrained_cfg["label_names"] == ["cat"]
    with pytest.raises(ArgumentError, match=r"label_names has 3 entries.*with one output, the names of both classes"):
        convmixer.save_pretrained(model, tmp_path / "no", label_names=["a", "b", "c"])


def test_opened_everywhere(model, tmp_path):
    """As `push_to_hub` opens a folder in timm and transformers, where one output has one name."""
    labels = ("dog", "cat")
    folder = convmixer.save_pretrained(model, tmp_path / "folder", label_names=labels)
    assert max(verify(folder, model, labels).values()) < 1e-4


def test_exported(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model.pretrained_cfg["label_names"] = ["cat"]
    convmixer.export_model(model, tmp_path / "m.onnx", image_size=8)
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(facts["label_names"]) == ["not cat", "cat"]
    assert "the sigmoid of the logit is the probability of the last of label_names" in facts["probability"]
