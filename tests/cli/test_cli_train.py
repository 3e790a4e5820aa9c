"""`convmixer train`."""

import json
import re
import shutil

import numpy as np
import pytest
from command import records, run
from PIL import Image

pytestmark = pytest.mark.usefixtures("wide_terminal")


SMALL = ("--set", "batch_size=8", "--set", "epochs=1", "--set", "image_sizes=[[0, 8]]", "--device", "cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Forty training and eight test images of 8 x 8 pixels: bright and dark noise."""
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name, low in (("bright", 160), ("dark", 0)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(low, low + 90, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def test_train_then_predict(shapes, tmp_path):
    output = tmp_path / "run"
    options = ("--data", shapes, "--output", output, "--set", "model=convmixer_256_8", *SMALL)
    text = run("train", "cifar10-cpu", *options).stdout
    assert "convmixer_256_8 on cpu: 36 training, 4 validation images, 8 test images" in text
    assert "epoch   1" in text
    assert re.search(r"top-1 \d+\.\d\d % of 8 images", text)
    recipe = json.loads((output / "recipe.json").read_text())
    assert (recipe["batch_size"], recipe["epochs"], recipe["image_sizes"]) == (8, 1, [[0, 8]])
    assert recipe["lr"] == 0.01  # the rest is the recipe's
    assert len((output / "metrics.csv").read_text().splitlines()) == 2
    result = json.loads((output / "result.json").read_text())
    assert list(result["test_images"].values()) == [8]

    weights = output / "model.safetensors"
    found = records("predict", shapes / "test", "--checkpoint", weights, "--json", "--device", "cpu")
    assert len(found) == 8
    assert {guess["label"] for r in found for guess in r["predictions"]} == {"bright", "dark"}

    again = run("train", "cifar10-cpu", *options, status=2)
    assert "holds a run: resume it (--resume) or choose another folder" in again.stderr
    run("train", "cifar10-cpu", *options, "--resume")
    other = run("train", "cifar10-cpu", *options, "--resume", "--set", "lr=0.02", status=2)
    assert "with another recipe: lr was 0.01, is 0.02" in other.stderr


def test_tables_validation_sets_and_weights_by_the_command_line(shapes, tmp_path):
    rows = [f"{file.relative_to(shapes)},{file.parent.name}" for file in sorted(shapes.rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    labels = ("--data", shapes, "--labels", tmp_path / "labels.csv")
    options = (*labels, "--val", shapes / "test", "--output", tmp_path / "run", *SMALL)
    text = run("train", "cifar10-cpu", *options, "--set", "class_weights=[1, 2.5]", "--set", "draft=false").stdout
    assert text.splitlines()[:3] == [
        f"train: 40 images in 2 classes from {shapes.name}/train/ by labels.csv",
        "validation: 8 images in 2 classes from test/",
        f"test: 8 images in 2 classes from {shapes.name}/test/ by labels.csv",
    ]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["class_weights"] == [1, 2.5]
    taken = f"test: 8 images in 2 classes from {shapes.name}/test/ by labels.csv"
    shown = run("validate", tmp_path / "run", *labels, "--json", "--device", "cpu")
    assert json.loads(shown.stdout)["count"] == 8  # nothing but JSON
    assert taken in shown.stderr
    assert taken in run("validate", tmp_path / "run", *labels, "--no-draft", "--device", "cpu").stdout
    other = run("train", "cifar10-cpu", *options[:-4], "--set", "class_weights=even", status=2)
    assert "class_weights='even': give \"balanced\", or a number" in other.stderr


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("batch=8", r"'batch=8': give FIELD=VALUE with a field of model, checkpoint, "),
        ("batch_size", r"'batch_size': give FIELD=VALUE"),
        ("=8", r"'=8': give FIELD=VALUE"),
        ("epochs=ten", r"'epochs=ten': 'ten' is not a whole number"),
        ("epochs=1.5", r"'1\.5' is not a whole number"),
        ("lr=fast", r"'fast' is not a number"),
        ("knee=0.8,0.05", r"'0\.8,0\.05' is not a list such as \[2, 12\]"),
        ("rand_augment=2", r"'2' is not a list"),
        ("epochs=0", r"recipe field epochs=0: give a whole number of at least 1"),
        ("lr=-1", r"recipe field lr=-1\.0: give a finite number above 0"),
        ("lr=nan", r"recipe field lr=nan"),
        ("flip=2", r"recipe field flip=2\.0: give a number in \[0, 1\]"),
        ("knee=[0.8]", r"knee"),
        ('knee=["a", 1]', r"knee"),
        ("rand_augment=[2]", r"rand_augment"),
        ('rand_augment=["a", 1]', r"rand_augment"),
        ("image_sizes=[1, 2]", r"image_sizes"),
        ("image_sizes=[[0]]", r"image_sizes"),
        ("model=convmixer_256_9", r"unknown model 'convmixer_256_9'; did you mean convmixer_256_8"),
        ("opt=adamm", r"adamm"),
    ],
)
def test_wrong_settings(shapes, tmp_path, setting, text):
    options = ("--data", shapes, "--output", tmp_path / "run", *SMALL)
    result = run("train", "cifar10-cpu", *options, "--set", setting, status=2)
    assert re.search(text, result.stderr)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("cifar10", "--data", "{shapes}/none"), r"no data at .*none"),
        (("cifar10-gpu", "--data", "{shapes}"), r"unknown recipe 'cifar10-gpu'; did you mean cifar10"),
        (("cifar10-cpu",), r"Missing option '--data'"),
        (("cifar10-cpu", "--data", "{shapes}", "--resume"), r"nothing to resume"),
        (("cifar10-cpu", "--data", "{shapes}", "--set", "batch_size=64"), r"36 training images do not fill one batch"),
        (("cifar10-cpu", "--data", "{shapes}", "--precision", "float8"), r"float8"),
    ],
)
def test_training_that_cannot_start(shapes, tmp_path, arguments, text):
    arguments = [a.format(shapes=shapes) for a in arguments]
    result = run("train", *arguments, "--output", tmp_path / "run", "--device", "cpu", status=2)
    assert re.search(text, result.stderr)


def test_a_broken_training_image_is_named(shapes, tmp_path):
    """Nothing else may stand in for it: the accuracy would be that of other images."""
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data" / "test" / "dark" / "2.png").write_bytes(b"broken")
    options = ("--data", tmp_path / "data", "--output", tmp_path / "run", *SMALL)
    assert "cannot read image 6 of" in run("train", "cifar10-cpu", *options, status=2).stderr
