"""Data and the whole of a training run, on real images: scikit-learn's digits."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL_MODEL, shake, write_digits
from PIL import Image, ImageOps
from processes import finish, started, wait_for
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torchvision.datasets import CIFAR10

import convmixer
from convmixer import plots
from convmixer.data.memory import Images, Share, class_weights, hold_out, load_images
from convmixer.data.readers import FileSplit, has_split, open_split
from convmixer.errors import ArgumentError, ConvMixerError, DataError, DependencyError, TrainingStopped, WeightsError
from convmixer.evaluation import validate
from convmixer.factory import open_model
from convmixer.hub.checkpoints import read_metadata
from convmixer.native import library as native
from convmixer.native import training as training_kernels
from convmixer.training import Recipe, evaluate, get_recipe, train
from convmixer.training.history import Epoch
from convmixer.training.precision import flush_denormals
from convmixer.training.run import RunFolder
from convmixer.training.splits import source_name
from convmixer.training.trainer import Trainer, find_nonfinite

pytestmark = pytest.mark.usefixtures("no_curves")
QUICK = {"epochs": 2, "batch_size": 32, "lr": 0.01, **SMALL_MODEL}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """300 training and 60 test images of handwritten digits 0 to 3, as folders of PNG files."""
    return write_digits(tmp_path_factory.mktemp("digits"), 300, 60, [f"digit {i}" for i in range(4)])


def quiet(*_: object) -> None:
    pass


# ---- data -----------------------------------------------------------------------------------------------------------


def test_folder_and_tar_hold_the_same_images(digits, tmp_path):
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for file in sorted((digits / split).rglob("*.png")):
                archive.add(file, file.relative_to(digits / split))
    folder, packed = (load_images(source, "train", (3, 8, 8)) for source in (digits, tmp_path))
    assert len(folder) == 300
    assert folder.classes == packed.classes == ("digit 0", "digit 1", "digit 2", "digit 3")
    assert torch.equal(folder.pixels, packed.pixels)
    assert torch.equal(folder.labels, packed.labels)
    first = np.asarray(Image.open(sorted((digits / "train" / "digit 2").iterdir())[0]))
    index = int((folder.labels == 2).nonzero()[0])
    assert np.array_equal(folder.pixels[index].permute(1, 2, 0).numpy(), first)


def test_sizes_and_channels_are_fitted(digits):
    images = load_images(digits / "test", "test", (1, 12, 16))
    assert images.pixels.shape == (60, 1, 12, 16)


def test_torchvision_data_set(digits, tmp_path, monkeypatch):
    """CIFAR-10's own file format, with digits for pictures and so with other checksums than the real archive."""
    images = load_images(digits, "test", (3, 32, 32))
    content = {b"data": images.pixels.flatten(1).numpy(), b"labels": images.labels.tolist()}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, value in {"test_batch": content, "data_batch_1": content}.items():
        (folder / name).write_bytes(pickle.dumps({k.decode(): v for k, v in value.items()}))
    names = {"label_names": ["a", "b", "c", "d"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    md5 = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    for split in ("train", "test"):
        read = load_images("torch/cifar10", split, (3, 32, 32), root=tmp_path)
        assert read.classes == ("a", "b", "c", "d")
        assert torch.equal(read.pixels, images.pixels)
        assert torch.equal(read.labels, images.labels)


def test_hugging_face_data_set(digits, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the train extra is not installed")
    images = load_images(digits, "test", (3, 8, 8))
    columns = {
        "img": [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images.pixels],
        "label": images.labels.tolist(),
    }
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(images.classes))})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "test-0.parquet")
    read = load_images(f"hfds/{tmp_path / 'set'}", "test", (3, 8, 8), root=tmp_path / "cache")
    assert read.classes == images.classes
    assert torch.equal(read.pixels, images.pixels)
    assert torch.equal(read.labels, images.labels)


def test_splits_of_a_hugging_face_data_set(digits, tmp_path):
    """They are used as those of a folder, and a single image without a label, which is -1 there, is an error."""
    datasets = pytest.importorskip("datasets", reason="the train extra is not installed")
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images.pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(images.classes))})
    (tmp_path / "set").mkdir()
    for split, labels in {
        "train": images.labels.tolist(),
        "validation": images.labels.tolist(),
        "test": [-1] * 59 + [0],
    }.items():
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "set" / f"{split}-0.parquet")
    source, lines = f"hfds/{tmp_path / 'set'}", list[str]()
    assert [has_split(source, split, root=tmp_path / "cache") for split in ("validation", "test")] == [True, True]
    for split in ("valid", "validation"):
        found = load_images(source, split, (3, 8, 8), root=tmp_path / "cache", report=lines.append)
        assert torch.equal(found.labels, images.labels)
    assert lines[1] == f"validation: 60 images in 4 classes from {source}, split validation"
    with pytest.raises(DataError, match=r"cannot read image 0 of .*its label is -1, so it shows none of the 4 classes"):
        load_images(source, "test", (3, 8, 8), root=tmp_path / "cache", report=quiet)
    with pytest.raises(DataError, match=r"no split 'other' in 'hfds/.*'; valid: train, validation, test"):
        load_images(source, "other", (3, 8, 8), root=tmp_path / "cache", report=quiet)


def test_columns_of_a_hugging_face_data_set(digits, tmp_path):
    """Of several columns the first is taken, as of CIFAR-100's fine and coarse labels, and a line says so."""
    datasets = pytest.importorskip("datasets", reason="the train extra is not installed")
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images.pixels]
    kinds = datasets.ClassLabel(names=list(images.classes)), datasets.ClassLabel(names=["low", "high"])
    coarse = (images.labels >= 2).int().tolist()
    masks = [ImageOps.invert(picture) for picture in pictures]
    columns = {"img": pictures, "mask": masks, "fine": images.labels.tolist(), "coarse": coarse}
    features = dict(zip(columns, (datasets.Image(), datasets.Image(), *kinds), strict=True))
    (tmp_path / "set").mkdir()
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(tmp_path / "set" / "test-0.parquet")
    source, lines = f"hfds/{tmp_path / 'set'}", list[str]()
    found = load_images(source, "test", (3, 8, 8), root=tmp_path / "cache", report=lines.append)
    assert torch.equal(found.labels, images.labels)
    assert torch.equal(found.pixels, images.pixels)
    origin = f"from {source}, split test, column img (not mask)"
    assert lines == [f"test: 60 images in 4 classes {origin}, column fine (not coarse)"]
    assert open_split(source, None, labelled=False, root=tmp_path / "cache").taken == f"60 images {origin}"


@pytest.mark.parametrize(
    ("source", "split", "text"),
    [
        ("nowhere", "train", "no data at 'nowhere': give a folder"),
        ("{digits}/train/digit 0", "train", "the train images of .*, 76 in digit 0/, lie in no class folders"),
        ("{tmp}", "test", "no test split in .*, which holds .*/train/: call it one of test, testing"),
        ("torch/cifar10", "train", "cannot open 'torch/cifar10'"),
    ],
)
def test_data_that_is_not_there(digits, tmp_path, source, split, text):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=text):
        load_images(source.format(digits=digits, tmp=tmp_path), split, (3, 8, 8), root=tmp_path)


def test_labels_follow_the_classes_that_are_asked_for(digits):
    classes = ("zebra", "digit 3", "digit 2", "digit 1", "digit 0")
    asked, plain = load_images(digits, "test", (3, 8, 8), classes=classes), load_images(digits, "test", (3, 8, 8))
    assert asked.classes == classes
    assert torch.equal(asked.labels, 4 - plain.labels)
    with pytest.raises(DataError, match="has the classes digit 0, digit 1, digit 2, digit 3; the model knows cat, dog"):
        load_images(digits, "test", (3, 8, 8), classes=("cat", "dog"))


def test_classes_of_one_name_are_told_apart_or_refused():
    """ImageNet has two classes that are called crane: a bird and a machine."""
    same = FileSplit("set", ("crane", "cat", "crane"), "", [], [])
    assert same.labels_in(["crane", "cat", "crane"]).tolist() == [0, 1, 2]
    folders = FileSplit("set", ("cat", "crane"), "", [], [])
    assert folders.labels_in(("crane", "cat", "dog")).tolist() == [1, 0]
    with pytest.raises(DataError, match="several classes of the model are called crane, as one of 'set' is: nothing"):
        folders.labels_in(("crane", "cat", "crane"))


def test_an_unreadable_image_is_named(digits, tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot read image 0 of"):
        load_images(tmp_path, "train", (3, 8, 8))


def test_unreadable_images_are_left_out_on_request(digits, tmp_path):
    shutil.copytree(digits / "test", tmp_path / "set")
    spoiled = sorted((tmp_path / "set").rglob("*.png"))[::20]
    for file in spoiled:
        file.write_bytes(file.read_bytes()[:40])
    lines: list[str] = []
    images = load_images(tmp_path / "set", "test", (3, 8, 8), skip_unreadable=True, report=lines.append)
    assert len(images) == 57
    assert lines[0] == "test: 60 images in 4 classes from set/"
    assert "3 of 60 images are left out" in lines[1]
    assert all(f"{file.parent.name}/{file.name}" in lines[1] for file in spoiled)
    whole = load_images(digits, "test", (3, 8, 8))
    kept = [i for i, file in enumerate(sorted((tmp_path / "set").rglob("*.png"))) if file not in spoiled]
    assert torch.equal(images.pixels, whole.pixels[kept])
    assert torch.equal(images.labels, whole.labels[kept])
    with pytest.raises(DataError, match=r"cannot read image 0 of .*\.png"):
        load_images(tmp_path / "set", "test", (3, 8, 8))


def test_squashed_images_keep_their_borders(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, 8:] = 255
    wide[:, :2] = wide[:, -2:] = 99
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    modes = ("center", "squash")
    cropped, squashed = (load_images(tmp_path, "test", (3, 8, 8), crop_mode=mode).pixels[0, 0, 0] for mode in modes)
    assert cropped.tolist() == [0] * 4 + [255] * 4
    assert squashed[0] > 50
    assert squashed[-1] < 200


@pytest.mark.parametrize(
    "given", [{"crop_mode": "centre"}, {"crop_mode": "border"}, {"interpolation": "cubic"}], ids=str
)
def test_a_way_to_read_that_labelled_images_do_not_have_is_refused(digits, given):
    (name, value), *_ = given.items()
    with pytest.raises(ArgumentError, match=f"{name}='{value}': labelled images are read with"):
        load_images(digits, "test", (3, 8, 8), **given)


@pytest.mark.parametrize("name", ["tests", "trackers"])
def test_a_string_where_a_list_belongs_is_not_read_letter_by_letter(digits, tmp_path, name):
    with pytest.raises(ArgumentError, match=f"{name}='tensorboard': give a list"):
        train(Recipe(**QUICK), data=digits, output=tmp_path / "run", report=quiet, **{name: "tensorboard"})


def test_hold_out_is_a_partition_that_the_seed_decides():
    images = Images(torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(100), ("a",))
    training, validation = hold_out(images, 0.1, 3)
    assert (len(training), len(validation)) == (90, 10)
    assert sorted([*training.labels.tolist(), *validation.labels.tolist()]) == list(range(100))
    assert torch.equal(hold_out(images, 0.1, 3)[1].labels, validation.labels)
    assert not torch.equal(hold_out(images, 0.1, 4)[1].labels, validation.labels)
    assert len(hold_out(images, 0.0, 3)[1]) == 0


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_learns_and_leaves_its_records(digits, tmp_path, monkeypatch):
    from convmixer.training import run

    monkeypatch.setattr(run, "write_figure", plots.write_figure)
    monkeypatch.setattr(run, "plot_history", plots.plot_history)
    lines: list[str] = []
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 6, "flip": 0.0})
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=lines.append)
    assert result.test_accuracy[digits.name] > 80
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock", "best.safetensors", "last.pt", "last.safetensors", "metrics.csv", "metrics.json", "model.safetensors",
        "plots", "recipe.json", "result.json", "train.log"
    ]  # fmt: skip
    with Image.open(tmp_path / "run" / "plots" / "history.png") as curves:
        curves.load()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["lr"] == 0.01
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["test_accuracy"] == result.test_accuracy
    assert any("validation loss" in line for line in lines)
    model = open_model(str(tmp_path / "run"), device="cpu").eval()  # of other sizes than its variant
    assert (model.dim, len(model.blocks)) == (16, 2)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), result.model.eval()(x))
    assert model.pretrained_cfg["label_names"] == ("digit 0", "digit 1", "digit 2", "digit 3")
    images = load_images(digits, "test", (3, 8, 8))
    normalised = (images.pixels / 255 - torch.tensor(model.pretrained_cfg["mean"]).view(3, 1, 1)) / torch.tensor(
        model.pretrained_cfg["std"]
    ).view(3, 1, 1)
    correct = (model(normalised).argmax(1) == images.labels).float().mean().item() * 100
    assert result.test_accuracy[digits.name] == pytest.approx(correct)


@pytest.mark.parametrize("sizes", [3, ["depth"], [["depth", "two"]]])
def test_sizes_in_the_record_of_a_run_are_checked(tmp_path, sizes):
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "convmixer_256_8", "model_args": sizes}))
    with pytest.raises(DataError, match=r"which has a recipe\.json that names a model"):
        open_model(str(tmp_path), device="cpu")


def test_grey_images_that_are_not_square(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "in_chans": 1, "input_size": (8, 12), "image_sizes": ((0.0, 6),)})
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    model = convmixer.create_model("convmixer_128_8_ks7_p2", checkpoint=result.weights, device="cpu", depth=2, dim=16)
    assert model.in_chans == 1
    assert model.pretrained_cfg["input_size"] == (1, 8, 12)
    found = validate(model, digits)
    assert found.count == 60
    assert found.top1 == pytest.approx(result.test_accuracy[digits.name], abs=2)  # Pillow and torchvision round apart


def test_a_checkpoint_brings_its_image_size(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1, "input_size": (8, 8)})
    first = train(recipe, digits, tmp_path / "first", device="cpu", report=quiet)
    second = recipe.override(input_size=(), checkpoint=str(first.weights), lr=1e-9)
    result = train(second, digits, tmp_path / "second", device="cpu", report=quiet)
    assert result.model.pretrained_cfg["input_size"] == (3, 8, 8)
    assert torch.allclose(result.model.head.weight, first.model.head.weight, atol=1e-4)
    with pytest.raises(WeightsError, match="no weights file at"):
        train(recipe.override(checkpoint="none.safetensors"), digits, tmp_path / "none", device="cpu", report=quiet)
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match="lie in no class folders"):
        train(recipe, digits / "train" / "digit 0", tmp_path / "none", device="cpu", report=quiet)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(16, 24), (21, 35), (24, 24)])
@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30), (16, 24), (54, 40), (61, 47)])
def test_images_are_fitted_as_the_transform_of_timm_does(tmp_path, mode, size, shape):
    """A row more or less after resizing would change noise by tens of grey levels."""
    from timm.data import create_transform

    (tmp_path / "a").mkdir()
    noise = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.permute(1, 2, 0).numpy())
    image.save(tmp_path / "a" / "image.png")
    found = load_images(tmp_path, "test", (3, *size), interpolation="bicubic", crop_mode=mode, crop_pct=0.9)
    fitted = {"interpolation": "bicubic", "crop_mode": mode, "crop_pct": 0.9, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    expected = create_transform((3, *size), **fitted)(image) * 255
    assert (found.pixels[0] - expected).abs().mean() < 0.5


def test_without_validation_the_test_images_are_looked_at_once(digits, tmp_path, monkeypatch):
    from convmixer.training import session

    real, seen = session.evaluate, []

    def spy(model, images, **options):
        seen.append(len(images))
        return real(model, images, **options)

    monkeypatch.setattr(session, "evaluate", spy)
    recipe = get_recipe("cifar10", **QUICK, validation_fraction=0.0)
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    assert seen == [0, 0, 60]
    assert list(result.test_accuracy) == [digits.name]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["training_images"] == 300
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_classes_without_a_test_split(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    result = train(recipe, digits / "train", tmp_path / "a", device="cpu", report=quiet)
    assert result.test_accuracy == {}
    result = train(recipe, digits / "train", tmp_path / "b", tests=[digits / "test"], device="cpu", report=quiet)
    assert list(result.test_accuracy) == ["test"]
    assert convmixer.predict(result.model, torch.rand(3, 8, 8), topk=1)[0][0].startswith("digit ")


def test_test_sets_of_one_name_are_all_tested(digits, tmp_path, monkeypatch):
    """The data's own, and others whose folders have its name, one of them given by that name only."""
    monkeypatch.chdir(shutil.copytree(digits, tmp_path / "work" / digits.name).parent)
    shutil.rmtree(Path(digits.name) / "train")
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    tests = [digits.name, f"./{digits.name}/test", digits]
    result = train(recipe, digits, tmp_path / "run", tests=tests, device="cpu", report=quiet)
    assert list(result.test_accuracy) == [digits.name, f"{digits.name} (2)", "test", str(digits)]


def test_the_current_folder_has_its_own_name(digits, monkeypatch):
    monkeypatch.chdir(digits)
    assert (source_name("."), source_name("torch/cifar10")) == (digits.name, "torch/cifar10")


# ---- which images, by which labels, how often -----------------------------------------------------------------------


def test_validation_images_of_its_own_are_used_and_none_held_out(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "set")
    (tmp_path / "set" / "train").rename(tmp_path / "set" / "training")
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "Valid")
    lines: list[str] = []
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    result = train(recipe, tmp_path / "set", tmp_path / "run", device="cpu", report=lines.append)
    taken = [
        "train: 300 images in 4 classes from set/training/",
        "validation: 60 images in 4 classes from set/Valid/",
        "test: no images",
    ]
    assert lines[:3] == (tmp_path / "run" / "train.log").read_text().splitlines()[:3] == taken
    assert lines[3].endswith("300 training, 60 validation images, no test images")
    assert result.test_accuracy == {}
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    result.model.set_fused("auto")  # as it was validated
    assert result.history[0].validation_loss == pytest.approx(
        evaluate(result.model, images, precision="auto")["loss"], rel=1e-5
    )


def test_a_validation_set_may_be_given(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    given = train(recipe, digits, tmp_path / "a", val=digits / "test", device="cpu", report=quiet)
    held = train(recipe, digits, tmp_path / "b", device="cpu", report=quiet)
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    scores = evaluate(given.model, images, precision="auto")
    assert given.history[0].validation_accuracy == pytest.approx(scores["top1"])
    assert given.test_accuracy == {digits.name: pytest.approx(scores["top1"], abs=2)}
    records = [json.loads((tmp_path / name / "result.json").read_text())["training_images"] for name in "ab"]
    assert records == [300, 270]
    assert len(held.history) == 1
    with pytest.raises(ArgumentError, match="validation images: 60, here 30"):
        train(recipe.override(epochs=2), digits, tmp_path / "a", device="cpu", resume=True, report=quiet)


def test_a_table_of_labels_trains_as_class_folders_do(digits, tmp_path):
    pandas = pytest.importorskip("pandas", reason="the train extra is not installed")
    files = sorted(digits.rglob("*.png"))
    for file in files:  # named so that they come in the order of the class folders
        copy = tmp_path / "set" / file.parts[-3] / f"{file.parent.name[-1]}-{file.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    rows = {"image": [f"{f.parent.name[-1]}-{f.stem}" for f in files], "label": [f.parent.name for f in files]}
    pandas.DataFrame(rows).sample(frac=1, random_state=0).to_csv(tmp_path / "labels.csv", index=False)
    recipe, runs = get_recipe("cifar10", **{**QUICK, "epochs": 1}), []
    for name, data, labels in (("a", digits, None), ("b", tmp_path / "set", tmp_path / "labels.csv")):
        runs.append(train(recipe, data, tmp_path / name, labels=labels, device="cpu", report=quiet))
    _assert_equal(tmp_path / "b", load_file(runs[0].weights))
    assert [list(run.test_accuracy.values()) for run in runs] == [list(runs[0].test_accuracy.values())] * 2
    model = runs[1].model
    by_folder, by_table = (
        validate(model, digits, report=quiet),
        validate(model, tmp_path / "set", labels=tmp_path / "labels.csv", report=quiet),
    )
    assert by_table.classes == by_folder.classes
    assert by_table.loss == pytest.approx(by_folder.loss)

    table = pandas.read_csv(tmp_path / "labels.csv")
    first = table.index[table["image"] == "0-0000"]
    assert len(first) == 1
    table.loc[first, "label"] = "digit 1"
    table.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ArgumentError, match=r"with other data: .*; other labels"):
        train(
            recipe.override(epochs=2),
            tmp_path / "set",
            tmp_path / "b",
            labels=tmp_path / "labels.csv",
            device="cpu",
            resume=True,
            report=quiet,
        )


@pytest.fixture(scope="session")
def rare(digits, tmp_path_factory) -> Path:
    """All images of digit 3 and eight of digit 2, which look alike to a small model; all test images of both."""
    root = tmp_path_factory.mktemp("rare")
    for split, label, count in (("train", 3, None), ("train", 2, 8), ("test", 3, None), ("test", 2, None)):
        folder = digits / split / f"digit {label}"
        (root / split / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:count]:
            shutil.copy(file, root / split / folder.name)
    return root


@pytest.mark.parametrize(
    ("fields", "stream"),
    [
        ({"class_weights": "balanced"}, False),
        ({"class_weights": (9.0, 1.0)}, False),
        ({"balanced": True}, False),
        ({"balanced": True}, True),
    ],
)
def test_rare_classes_are_made_up_for(rare, tmp_path, fields, stream):
    common = {**QUICK, "epochs": 4, "batch_size": 16, "flip": 0.0, "validation_fraction": 0.0, "stream": stream}
    found = {}
    for name, extra in {"plain": {}, "made up for": fields}.items():
        options = {"workers": 0} if stream else {}
        run = train(
            get_recipe("cifar10", **common, **extra), rare, tmp_path / name, device="cpu", report=quiet, **options
        )
        scores = {c.label: c.top1 for c in validate(run.model, rare, report=quiet).classes}
        found[name] = scores["digit 2"]
    assert found["made up for"] > found["plain"] + 20


def test_balanced_class_weights_are_those_of_scikit_learn():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    images = Images(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels, ("a", "b", "c"))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert class_weights(Recipe(class_weights="balanced"), images).tolist() == pytest.approx(expected.tolist())
    assert class_weights(Recipe(class_weights=(1, 2.5, 0.5)), images).tolist() == [1, 2.5, 0.5]
    assert class_weights(Recipe(), images) is None
    with pytest.raises(ArgumentError, match=r"has 2 weights: give one for each of the 3 classes a, b, c"):
        class_weights(Recipe(class_weights=(1.0, 2.0)), images)


@pytest.mark.parametrize("fields", [{}, {"mixup": 0.5, "mix_prob": 0.0}])  # mixed targets, though nothing is mixed
def test_class_weights_multiply_the_loss(digits, tmp_path, fields):
    def losses(weight):
        recipe = get_recipe("cifar10", **{**QUICK, **fields, "epochs": 1, "lr": 1e-12, "class_weights": (weight,) * 4})
        return train(recipe, digits, tmp_path / f"{weight}", device="cpu", report=quiet).history[0].train_loss

    assert losses(10.0) == pytest.approx(10 * losses(1.0), rel=1e-4)


def test_balanced_drawing_shows_all_classes_as_often():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    pixels = torch.arange(1000).view(-1, 1, 1, 1)
    images = Images(pixels, labels, ("a", "b", "c")).balanced()
    shares = [Share(0, epoch, 100, 1, range(1), range(10)) for epoch in range(20)]
    drawn = [torch.cat([pixels.flatten() for pixels, _ in images.parts(share)]) for share in shares]
    counts = labels[torch.cat(drawn)].bincount() / 20_000
    assert counts.tolist() == pytest.approx([1 / 3] * 3, abs=0.015)  # more than four standard deviations
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.cat([pixels.flatten() for pixels, _ in images.parts(shares[0])]), drawn[0])
    assert images.subset(torch.arange(5)).odds is None
    # Two processes take disjoint parts of the same draws.
    halves = [Share(0, 0, 100, 2, range(i, i + 1), range(10)) for i in range(2)]
    parts = [[pixels.flatten() for pixels, _ in images.parts(half)] for half in halves]
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)]), drawn[0])


def test_same_seed_same_weights_other_seed_other_weights(digits, tmp_path):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1, "seed": seed, "rand_augment": (2, 12)})
        result = train(recipe, digits, tmp_path / str(i), device="cpu", report=quiet)
        weights.append(load_file(result.weights)["head.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fields", [{}, {"balanced": True, "class_weights": (1.0, 2.0, 1.0, 0.5)}, {"teacher": "run"}])
def test_resume_is_exact(digits, tmp_path, fields):
    if "teacher" in fields:
        recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
        fields = {
            "teacher": str(train(recipe, digits, tmp_path / "teacher", device="cpu", report=quiet).weights.parent)
        }
    changes = {**QUICK, "epochs": 3, "rand_augment": (1, 9), "random_erasing": 0.5, "drop_rate": 0.1, "shift": 1}
    changes |= fields
    recipe = get_recipe("cifar10", **changes)
    whole = train(recipe, digits, tmp_path / "whole", device="cpu", report=quiet)

    def interrupt(line: str) -> None:
        if line.startswith("epoch   2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train(recipe, digits, tmp_path / "parts", device="cpu", report=interrupt)
    parts = train(recipe, digits, tmp_path / "parts", device="cpu", resume=True, report=quiet)
    a, b = load_file(whole.weights), load_file(parts.weights)
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = {"seconds": 0.0, "images_per_second": 0.0}
    rows = [[dataclasses.replace(r, **strip) for r in result.history] for result in (whole, parts)]
    assert rows[0] == rows[1]


def test_resume_refuses_another_recipe_and_an_empty_folder(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    with pytest.raises(ArgumentError, match="nothing to resume"):
        train(recipe, digits, tmp_path / "run", resume=True, report=quiet)
    train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    with pytest.raises(ArgumentError, match=r"holds a run: resume it \(--resume\) or choose another folder"):
        train(recipe, digits, tmp_path / "run", report=quiet)
    with pytest.raises(ArgumentError, match=re.escape("lr was 0.01, is 0.02")):
        train(recipe.override(lr=0.02), digits, tmp_path / "run", device="cpu", resume=True, report=quiet)
    longer = train(recipe.override(epochs=2), digits, tmp_path / "run", device="cpu", resume=True, report=quiet)
    assert [row.epoch for row in longer.history] == [1, 2]
    with pytest.raises(ArgumentError, match="has 2 epochs begun: give epochs of at least that"):
        train(recipe, digits, tmp_path / "run", device="cpu", resume=True, report=quiet)
    with pytest.raises(ArgumentError, match=r"with other data: it had 270 training images of 4 classes, here are 54"):
        train(recipe.override(epochs=3), digits / "test", tmp_path / "run", device="cpu", resume=True, report=quiet)
    (tmp_path / "run" / "last.pt").write_bytes(b"garbage")
    with pytest.raises(ConvMixerError, match="cannot resume from"):
        train(recipe, digits, tmp_path / "run", device="cpu", resume=True, report=quiet)


def test_a_loss_that_explodes_stops_the_run(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "opt": "sgd", "lr": 1e30, "warmup": 0.0})
    with pytest.raises(ConvMixerError, match=r"in epoch 1, step \d.*: .* is not finite\. Set a lower lr, or clip_grad"):
        train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_the_layer_that_overflows_is_named():
    model = convmixer.ConvMixer(8, 3, 3, 2, num_classes=2).eval()
    images = torch.randn(2, 3, 8, 8)
    assert "gradients" in find_nonfinite(model, images)
    assert find_nonfinite(model, images * math.nan) == "the images are not finite"
    model.blocks[1][1].bias.data.fill_(3e38)
    model.blocks[1][1].weight.data.fill_(3e38)
    assert find_nonfinite(model, images) == "the output of blocks.1.1 is not finite"
    model.head.bias.data.fill_(math.inf)
    assert find_nonfinite(model, images) == "head.bias is not finite"


def test_early_stopping_restores_the_best_weights(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 30, "lr": 0.02, "patience": 2, "min_delta": 0.01})
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    losses = [row.validation_loss for row in result.history]
    assert len(losses) < 30
    best = 0
    for i, loss in enumerate(losses):
        if loss < losses[best] - 0.01:
            best = i
    assert len(losses) == best + 3
    images = load_images(digits, "train", (3, 8, 8))
    validation = hold_out(images, recipe.validation_fraction, recipe.seed)[1]
    result.model.set_fused("auto")  # as it was validated
    assert evaluate(result.model, validation, precision="auto")["loss"] == pytest.approx(losses[best], rel=1e-5)
    kept, named = load_file(result.weights), load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(kept[key], named[key]) for key in kept)
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())["validation_accuracy"]
    assert recorded == result.history[best].validation_accuracy


@pytest.mark.parametrize("name", ["last.pt", "best.safetensors"])
def test_the_best_weights_are_those_of_the_best_epoch_wherever_a_run_was_killed(digits, tmp_path, monkeypatch, name):
    """Though the epoch that was lost comes out otherwise when it is repeated, as it may on another machine."""
    recipe = get_recipe("cifar10", **{**QUICK, "patience": 2})
    losses, weights, writes = [2.0, 1.0, 3.0], [], []
    real = RunFolder.saving

    def score(model, images, *, precision=None, progress=None):
        if precision is None:  # the test images, at the end
            return evaluate(model, images)
        weights.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return {**evaluate(model, images, precision=precision), "loss": losses[len(weights) - 1]}

    def saving(self, path):
        writes.append(path)
        if writes.count(name) == 2 and path == name:
            raise Interrupted  # nothing catches it
        return real(self, path)

    monkeypatch.setattr("convmixer.training.session.evaluate", score)
    monkeypatch.setattr(RunFolder, "saving", saving)
    with pytest.raises(Interrupted):
        train(recipe, digits, tmp_path, device="cpu", report=quiet)
    result = train(recipe, digits, tmp_path, device="cpu", resume=True, report=quiet)
    found = [row.validation_loss for row in result.history]
    assert found in ([2.0, 1.0], [2.0, 3.0])
    expected = weights[found.index(min(found))]
    kept = load_file(result.weights)
    assert all(torch.equal(kept[key], expected[key]) for key in kept)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [float(row["validation_loss"]) for row in csv.DictReader(file)] == found


def test_results_lie_beside_the_weights_that_they_are_of(digits, tmp_path):
    recipe, options = get_recipe("cifar10", **{**QUICK, "validation_fraction": 0.0}), {"device": "cpu", "report": quiet}
    folder = tmp_path / "run"
    train(recipe, digits, folder, **options)
    assert (folder / "result.json").exists()

    def stop(line):
        if line.startswith("epoch   3"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        train(recipe.override(epochs=9), digits, folder, resume=True, device="cpu", report=stop)
    assert not (folder / "result.json").exists()
    with pytest.raises(DataError, match=r"not the folder of a finished run.*--resume"):
        convmixer.push_to_hub(folder, "me/model", licence="mit")

    validated, folder = get_recipe("cifar10", **QUICK), tmp_path / "other"
    train(validated, digits, folder, **options)
    (folder / "last.pt").unlink()
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConvMixerError, match=r"became|not finite"):  # before the first epoch has ended
        train(recipe.override(lr=1e30), digits, folder, **options)
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        ".lock", "model.safetensors", "recipe.json", "train.log"
    ]  # fmt: skip
    assert (folder / "model.safetensors").read_bytes() == before


def test_weights_that_end_as_nan_are_an_error_without_validation_images(digits, tmp_path, monkeypatch):
    """The last update may spoil them, after the last loss was computed."""
    recipe = get_recipe("cifar10", **{**QUICK, "validation_fraction": 0.0})
    real, updates = Trainer._update, []

    def update(self):
        real(self)
        updates.append(1)
        if len(updates) == 2 * self.steps:
            self.model.head.bias.data[0] = math.nan

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(ConvMixerError, match=r"head\.bias is not finite after epoch 2"):
        train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train(recipe, digits, tmp_path / "run", device="cpu", resume=True, report=quiet)


def test_a_class_of_which_all_images_are_held_out_is_named(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "set")
    for file in sorted((tmp_path / "set" / "train" / "digit 2").iterdir())[1:]:
        file.unlink()
    lines, recipe = [], get_recipe("cifar10", **{**QUICK, "epochs": 1, "validation_fraction": 0.5})
    for seed in range(8):
        train(recipe.override(seed=seed), tmp_path / "set", tmp_path / f"{seed}", device="cpu", report=lines.append)
    named = [line for line in lines if line.startswith("no training image is left of digit 2: all were held out")]
    assert 0 < len(named) < 8


@pytest.mark.parametrize("stream", [False, True])
def test_resume_refuses_other_images_of_equal_number(digits, tmp_path, stream):
    data = tmp_path / "set"
    shutil.copytree(digits / "train", data / "train")
    shutil.copytree(digits / "test", data / "val")
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1}, stream=stream)
    options = {"device": "cpu", "report": quiet} | ({"workers": 0} if stream else {})
    train(recipe, data, tmp_path / "run", **options)
    longer = recipe.override(epochs=2)
    first = min((data / "train" / "digit 1").iterdir())
    renamed = first.rename(first.with_name("9999.png"))
    with pytest.raises(ArgumentError, match=r"with other data: .*; other names"):
        train(longer, data, tmp_path / "run", resume=True, **options)
    renamed.rename(first)
    (data / "val" / "digit 1").rename(data / "val" / "digit")
    (data / "val" / "digit 2").rename(data / "val" / "digit 1")
    (data / "val" / "digit").rename(data / "val" / "digit 2")
    with pytest.raises(ArgumentError, match=r"with other data: .*; other validation labels"):
        train(longer, data, tmp_path / "run", resume=True, **options)


def test_frozen_backbone_and_layer_decay(digits, tmp_path, monkeypatch):
    from convmixer.training import trainer

    tiny = {"image_sizes": ((0.0, 8),), "epochs": 1, "batch_size": 135}
    frozen = get_recipe("finetune", frozen=1.0, **tiny)
    result = train(frozen, digits, tmp_path / "frozen", device="cpu", report=quiet)
    source = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").state_dict()
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, source[key]) or key.startswith("head.")

    rates = {}
    real = trainer.create_optimizer

    def spy(recipe, model, where):
        optimizer = real(recipe, model, where)
        names = {parameter: name for name, parameter in model.named_parameters()}
        rates.update({names[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]})
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", spy)
    train(get_recipe("finetune", layer_decay=0.5, **tiny), digits, tmp_path / "decay", device="cpu", report=quiet)
    assert rates["head.weight"] == 1
    assert rates["blocks.7.1.weight"] / rates["blocks.6.1.weight"] == pytest.approx(2)
    assert rates["blocks.0.1.weight"] < rates["blocks.7.1.weight"] / 100


def test_the_average_of_the_weights_is_what_is_kept(digits, tmp_path):
    """With a rate of 0 after the first epoch the weights stand still and the average must reach them."""
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1, "ema_decay": 0.5})
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    kept = load_file(result.weights)
    assert all(torch.equal(kept[key], state["average"][key]) for key in kept)
    assert not torch.equal(state["average"]["head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("fields", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0, "crop_scale": 0.5}])
def test_mixing_images_still_learns(digits, tmp_path, fields):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 6, "flip": 0.0, **fields})
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    assert result.test_accuracy[digits.name] > 60


def test_tracker(digits, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 2})
    result = train(recipe, digits, tmp_path / "run", device="cpu", trackers=["tensorboard"], report=quiet)
    log = events.EventAccumulator(str(tmp_path / "run" / "convmixer")).Reload()
    logged = [(event.step, event.value) for event in log.Scalars("train_loss")]
    assert logged == [(row.epoch, pytest.approx(row.train_loss)) for row in result.history]
    with pytest.raises(ArgumentError, match="trackers="):
        train(recipe, digits, tmp_path / "other", device="cpu", trackers=["nothing"], report=quiet)


# ---- runs that survive ----------------------------------------------------------------------------------------------


COMMAND = ["train", "cifar10", "--device", "cpu", "--set", "batch_size=90", "--set", "rand_augment=[1, 9]"]
COMMAND += ["--set", "model=convmixer_128_8_ks7_p2", "--set", "image_sizes=[[0, 4]]", "--set", "random_erasing=0.5"]

# The same in Python.
COMMANDED = get_recipe("cifar10", batch_size=90, rand_augment=(1, 9), model="convmixer_128_8_ks7_p2")
COMMANDED = COMMANDED.override(image_sizes=((0, 4),), random_erasing=0.5)


def _command(digits: Path, folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[object]:
    return [sys.executable, *launcher, "-m", "convmixer", *COMMAND, "--data", digits, "--output", folder, *options]


def test_a_program_ends_that_shows_no_environment_yet(monkeypatch):
    """Linux empties it when a program is started, and fills it a moment after `Popen` has returned."""
    monkeypatch.setattr(psutil.Process, "environ", lambda self: {})
    with started(["sleep", "20"]) as process:
        pass
    assert process.returncode == -signal.SIGKILL


def test_no_process_of_a_program_outlives_its_test(tmp_path):
    """Nor one that has left its group, as those of a launcher do."""
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '99'], start_new_session=True)\n"
    code += "open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"
    file = tmp_path / "pid"
    with contextlib.suppress(Interrupted), started([sys.executable, "-c", code, file]) as process:
        while not (file.exists() and file.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        raise Interrupted
    child, deadline = int(file.read_text()), time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_killed_or_stopped_at_random_and_resumed_gives_the_same_weights(digits, tmp_path):
    train(COMMANDED.override(epochs=8), digits, tmp_path / "whole", device="cpu", report=quiet)
    folder, rows = tmp_path / "run", 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        (folder / "metrics.csv").unlink(missing_ok=True)
        command = _command(digits, folder, "--set", "epochs=8", *resume)
        with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            wait_for(process, folder / "metrics.csv", rows + random.randint(1, 2), seconds=120)
            time.sleep(random.random() / 5)
            process.send_signal(number)
            output = process.communicate(timeout=60)[0]
        if (folder / "last.pt").exists():
            rows = len(torch.load(folder / "last.pt", weights_only=True)["history"])
    assert process.returncode == 128 + signal.SIGTERM, output
    assert re.search(r"stopped (in|after) epoch .* saved: go on with --resume", output)
    train(COMMANDED.override(epochs=8), digits, folder, device="cpu", resume=True, report=quiet)
    _assert_equal(folder, load_file(tmp_path / "whole" / "model.safetensors"))
    with (folder / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(i + 1) for i in range(8)]


def test_stopping_in_the_middle_of_an_epoch_loses_nothing(digits, tmp_path, monkeypatch):
    fields = {"rand_augment": (1, 9), "drop_rate": 0.1, "mixup": 0.2, "cutmix": 0.5, "mix_prob": 0.7, "mix_until": 0.8}
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 2, **fields})
    whole = train(recipe, digits, tmp_path / "whole", device="cpu", report=quiet)
    real, count = Trainer.step, []

    def step(self, *arguments):
        count.append(1)
        if len(count) == 11:  # of eight steps an epoch
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(TrainingStopped, match="stopped in epoch 2 after step 3 of 8, and saved") as stop:
        train(recipe, digits, tmp_path / "parts", device="cpu", report=quiet)
    assert stop.value.signal == signal.SIGTERM
    with pytest.raises(ArgumentError, match="has 2 epochs begun"):
        train(recipe.override(epochs=1), digits, tmp_path / "parts", device="cpu", resume=True, report=quiet)
    parts = train(recipe, digits, tmp_path / "parts", device="cpu", resume=True, report=quiet)
    _assert_equal(tmp_path / "parts", load_file(whole.weights))
    assert parts.history[1].train_loss == pytest.approx(whole.history[1].train_loss, rel=1e-6)
    assert parts.history[1].train_accuracy == whole.history[1].train_accuracy


def test_a_folder_is_trained_in_once_at_a_time(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    refused = pytest.raises(ArgumentError, match=r"another process is training in .*: wait for it or choose another")
    with RunFolder(tmp_path / "run", recipe, resume=False).locked(), refused:
        train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)


def test_hidden_files_in_the_folder_of_a_run_stay(digits, tmp_path):
    """Only what a killed write of a run leaves is deleted: the folder may be one that somebody works in."""
    (tmp_path / ".vscode.d").mkdir()
    for name in (".pre-commit-config.yaml", ".env.local", ".last.pt", ".last.pt.0f4a92bc"):
        (tmp_path / name).write_text("mine")
    train(get_recipe("cifar10", **{**QUICK, "epochs": 1}), digits, tmp_path, device="cpu", report=quiet)
    hidden = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert hidden == [".env.local", ".last.pt", ".lock", ".pre-commit-config.yaml", ".vscode.d"]


def test_weights_of_others_are_not_replaced(digits, tmp_path):
    model = convmixer.create_model("convmixer_256_8", device="cpu", dim=8, depth=1, num_classes=4)
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    convmixer.save_pretrained(model, tmp_path / "published")
    before = (tmp_path / "published" / "model.safetensors").read_bytes()
    for resume in (False, True):
        with pytest.raises(ArgumentError, match=r"holds a model\.safetensors that is not of a run, and the run would"):
            train(recipe, digits, tmp_path / "published", device="cpu", resume=resume, report=quiet)
    assert (tmp_path / "published" / "model.safetensors").read_bytes() == before
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    before = result.weights.read_bytes()
    with pytest.raises(ArgumentError, match=r"is the folder of a run, whose model\.safetensors would be"):
        convmixer.save_pretrained(tmp_path / "run", tmp_path / "run")
    assert result.weights.read_bytes() == before
    (tmp_path / "run" / "last.pt").unlink()
    train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)  # it starts again, as the messages say


def test_a_folder_keeps_what_other_programs_put_there(tmp_path):
    """Leftovers of writes that were killed go; hidden files of others stay, in a run folder that is a project."""
    others = (".gitlab-ci.yml", ".pre-commit-config.yaml", ".last.pt.backup", "plots/.history.png.old")
    (tmp_path / "plots").mkdir()
    for name in others:
        (tmp_path / name).write_text("theirs")
    code = "import os, sys; from convmixer.files import write_atomically as w; w(sys.argv[1], lambda _: os._exit(9))"
    for name in ("last.pt", "plots/history.png"):
        assert subprocess.run([sys.executable, "-c", code, tmp_path / name], check=False).returncode == 9
    assert len([file for file in tmp_path.rglob(".*.*") if file.is_file()]) == len(others) + 2
    with RunFolder(tmp_path, get_recipe("cifar10"), resume=False).locked():
        left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {*others, ".lock"}


@pytest.mark.parametrize("name", ["last.pt", "last.safetensors"])
def test_a_full_disk_loses_no_checkpoint(digits, tmp_path, monkeypatch, name):
    resource = pytest.importorskip("resource", reason="limits of file size are POSIX")
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 3})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    real, writes = RunFolder.saving, []

    def saving(self, path):
        writes.append(path)
        if path == name and writes.count(name) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        return real(self, path)

    monkeypatch.setattr(RunFolder, "saving", saving)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        saved = "What was saved before is intact: make room"
        with pytest.raises(ConvMixerError, match=rf"cannot write .*{name}.*too large.*{saved}"):
            train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [p for p in (tmp_path / "run").iterdir() if re.match(r"\.(?!lock)", p.name)]
    result = train(recipe, digits, tmp_path / "run", device="cpu", resume=True, report=quiet)
    whole = train(recipe, digits, tmp_path / "whole", device="cpu", report=quiet)
    _assert_equal(tmp_path / "run", load_file(whole.weights))
    assert len(result.history) == 3


def test_two_processes_compute_what_one_does_in_two_parts(digits, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    common = ["--set", "epochs=3", "--set", "drop_rate=0.1", "--set", "mixup=0.2", "--set", "batch_size=88"]
    done = finish(_command(digits, tmp_path / "two", *common, launcher=launcher))
    assert done.returncode == 0, done.stdout + done.stderr
    one = COMMANDED.override(epochs=3, drop_rate=0.1, mixup=0.2, batch_size=88, accumulate=2)
    train(one, digits, tmp_path / "one", device="cpu", report=quiet)
    histories = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for one, two in zip(*histories, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.5)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2


THREADS = """
import contextlib
import sys
from pathlib import Path
from convmixer.training import get_recipe, train
recipe = get_recipe("cifar10", batch_size=88, model_args=(("dim", 8), ("depth", 1)), epochs=1)
train(recipe, sys.argv[1], sys.argv[2], device="cpu", report=lambda line: None)
names = []
for task in Path("/proc/self/task").iterdir():
    with contextlib.suppress(OSError):  # a thread may end between the listing and here, even after it was joined
        names.append((task / "comm").read_text().strip())
line = " ".join([*(name for name in names if "gloo" in name), "end"])
sys.stdout.write(line + "\\n")  # at once: two processes share the pipe, and print writes the end of the line by itself
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads")
def test_threads_for_other_processes_end_with_the_training(digits, tmp_path):
    """One of them would abort the process, if it released a tensor of Python while the interpreter ends."""
    (tmp_path / "program.py").write_text(THREADS)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    done = finish([sys.executable, *launcher, tmp_path / "program.py", digits, tmp_path / "run"])
    assert (done.returncode, done.stdout.split()) == (0, ["end", "end"]), done.stdout + done.stderr


def test_fused_blocks_train_alike(digits, tmp_path):
    losses = []
    for fused in (False, True):  # in one process, synchronised BatchNorm is BatchNorm
        recipe = get_recipe("cifar10", **QUICK, sync_batchnorm=fused)
        options = {"device": "cpu", "precision": "float32", "fused": fused, "report": quiet}
        result = train(recipe, digits, tmp_path / str(fused), **options)
        losses.append([row.train_loss for row in result.history])
        assert result.model.fused is fused
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    recipe = get_recipe("cifar10", **QUICK, drop_path_rate=0.1)
    with pytest.raises(ArgumentError, match=r"drop_path_rate=0\.1 of the recipe: .* set them to 0"):
        train(recipe, digits, tmp_path / "refused", device="cpu", fused=True, report=quiet)


def test_too_few_images(digits, tmp_path):
    with pytest.raises(ArgumentError, match="270 training images do not fill one batch of 512"):
        train(get_recipe("cifar10"), digits, tmp_path / "run", report=quiet)


def test_fine_tuning_starts_from_the_weights(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "model": "convmixer_256_8.cifar10", "epochs": 1, "lr": 1e-9})
    recipe = recipe.override(model_args=(), input_size=(), image_sizes=((0.0, 8),))
    result = train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    source = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    for a, b in zip(result.model.blocks.parameters(), source.blocks.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert result.model.num_classes == 4


@pytest.mark.parametrize("name", ["local-dir:published", "local-dir:./published"])
def test_fine_tuning_starts_from_a_published_folder(digits, tmp_path, monkeypatch, name):
    """With its weights, and with its preprocessing; the files of the run say both."""
    monkeypatch.chdir(tmp_path)
    sizes = {"dim": 16, "depth": 2}
    source = shake(convmixer.create_model("convmixer_128_8_ks7_p2", num_classes=4, device="cpu", **sizes))
    source.pretrained_cfg |= {"mean": (0.25, 0.5, 0.75), "interpolation": "nearest", "input_size": (3, 8, 8)}
    convmixer.save_pretrained(source, "published", label_names=list("abcd"))
    recipe = get_recipe("cifar10", **{**QUICK, "model": name, "model_args": (), "input_size": (), "lr": 1e-12})
    model = train(recipe, digits, "run", device="cpu", report=quiet).model
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, source.state_dict()[key], atol=1e-6, rtol=0)
    base = read_metadata("run/model.safetensors")["architecture"]
    again = convmixer.create_model(base, checkpoint="run/model.safetensors", device="cpu", **sizes)
    for opened in (model, open_model("run", device="cpu"), again):
        config = opened.pretrained_cfg
        assert (config["mean"], config["interpolation"]) == ((0.25, 0.5, 0.75), "nearest")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"image_sizes": ((0.0, 1),)},
            r"image_sizes=.* 1 pixels are less than a patch of convmixer_\w+, 2",
        ),
        ({"input_size": (8, 1)}, r"input_size=\(8, 1\): 1 pixels are less than a patch of"),
    ],
)
def test_images_smaller_than_a_patch_are_refused_before_they_are_read(tmp_path, fields, text):
    with pytest.raises(ArgumentError, match=text):
        train(get_recipe("cifar10", **fields), tmp_path / "nowhere", tmp_path / "run", device="cpu", report=quiet)


def test_evaluate_restores_the_mode(digits):
    model = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=4)
    images = load_images(digits, "test", (3, 8, 8))
    scores = evaluate(model, images, batch_size=7)
    assert model.training
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = model.eval()((images.pixels / 255 - mean) / std)
    assert scores["count"] == 60
    assert scores["top1"] == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item())
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-4)


def test_evaluate_says_nan_where_the_model_does(digits):
    """Not the share of the first class."""
    model = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=4, dim=16, depth=1)
    torch.nn.init.constant_(model.head.bias, math.nan)
    scores = evaluate(model, load_images(digits, "test", (3, 8, 8), report=quiet))
    assert math.isnan(scores["loss"])
    assert math.isnan(scores["top1"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_evaluate_computes_in_the_type_of_the_model(digits, dtype, tolerance):
    model = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=4, dim=16, depth=1)
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    expected = evaluate(model, images)["loss"]
    assert evaluate(model.to(dtype), images)["loss"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="all names of files are Unicode there")
def test_names_that_are_not_unicode(digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "train")
    (tmp_path / "train" / "digit 0" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"broken")
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
    train(recipe, tmp_path, tmp_path / "run", device="cpu", skip_unreadable=True, report=quiet)
    assert r"caf\udce9.png" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


def test_settings_are_checked_before_data_are_read(tmp_path):
    with pytest.raises(ArgumentError, match="no device 'gpu' here"):
        train(get_recipe("cifar10", **QUICK), "nowhere", tmp_path / "run", device="gpu", report=quiet)
    with pytest.raises(ArgumentError, match="unknown precision 'fp8'; valid: auto, float32, bfloat16"):
        train(get_recipe("cifar10", **QUICK), "nowhere", tmp_path / "run", precision="fp8", report=quiet)


def test_compile_looks_for_its_compiler_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    needed = r"a CPU, and CXX='no-such-compiler' is not the name .*: install g\+\+, or name a compiler in CXX; or"
    with pytest.raises(DependencyError, match=needed + r" train without compile \(--compile\)"):
        train(get_recipe("cifar10", **QUICK), "nowhere", tmp_path / "run", device="cpu", compile=True, report=quiet)
    assert not (tmp_path / "run").exists()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else found(name, *a))
    assert native.inductor_lacks(torch.device("cuda")) == "needs triton on a GPU, which is missing: pip install triton"


@pytest.mark.slow
@pytest.mark.skipif(native.inductor_lacks(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_compiled_training_is_the_same(digits, tmp_path):
    losses = []
    for compile in (False, True):
        torch._dynamo.reset()
        recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1, "batch_size": 90, "image_sizes": ((0, 4),)})
        options = {"device": "cpu", "precision": "float32", "fused": compile, "compile": compile, "report": quiet}
        losses.append(train(recipe, digits, tmp_path / str(compile), **options).history[0].train_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.gpu
def test_on_a_gpu(digits, tmp_path):
    recipe = get_recipe("cifar10", **{**QUICK, "epochs": 6, "flip": 0.0})
    assert train(recipe, digits, tmp_path / "run", device="cuda", report=quiet).test_accuracy[digits.name] > 80


def test_tiny_numbers_are_zero_while_training():
    # A processor takes up to 100 times as long over them.
    seen = []
    with flush_denormals(torch.device("cpu")):
        seen.append(float(torch.full((1000,), 1e-30).mul(1e-10).max()))
    assert seen == [0]
    assert float(torch.full((1000,), 1e-30).mul(1e-10).max()) == pytest.approx(1e-40, rel=1e-3)


def test_a_line_without_validation_images_says_nothing_of_them():
    line = "epoch   3  train loss 0.5000 accuracy 80.00 %  2 s (50 images/s)"
    assert str(Epoch(3, 0.1, 0.5, 80.0, math.nan, math.nan, 2.0, 50.0)) == line
    assert "  validation loss 0.2500 accuracy 90.00 %  " in str(Epoch(3, 0.1, 0.5, 80.0, 0.25, 90.0, 2.0, 50.0))


@pytest.mark.parametrize("fused", [True, "auto", False])
@pytest.mark.parametrize("enabled", [True, False])
def test_what_computes_the_blocks_is_said(digits, tmp_path, fused, enabled):
    if reason := training_kernels.lacking():
        pytest.skip(reason)
    lines: list[str] = []
    training_kernels.set_native_training(enabled)
    try:
        recipe = get_recipe("cifar10", **{**QUICK, "epochs": 1})
        train(recipe, digits, tmp_path / "run", device="cpu", fused=fused, report=lines.append)
    finally:
        training_kernels.set_native_training(True)
    off = "set_native_training(False) was called"
    expected = {
        (True, True): ["blocks are fused, by native kernels"],
        ("auto", True): ["blocks are fused, by native kernels"],
        (True, False): [f"blocks are fused, by PyTorch: {off}"],
        ("auto", False): [f"blocks are not fused: {off}"],
    }
    assert [line for line in lines if line.startswith("blocks are")] == expected.get((fused, enabled), [])
