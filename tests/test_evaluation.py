"""Validation against scikit-learn, NumPy, closed formulas, and what `predict` says of the same files."""

import dataclasses
import json
import math
import re
import shutil

import command
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

import convmixer
from convmixer.data.memory import load_images
from convmixer.errors import ArgumentError, DataError
from convmixer.evaluation import calibration_error, compare, validate
from convmixer.training import evaluate, get_recipe, train

pytestmark = pytest.mark.usefixtures("wide_terminal")
LABELS = ("gamma", "beta", "zeta", "alpha", "epsilon", "delta", "nobody")
PRESENT = sorted(LABELS[:-1])


def build(name="convmixer_256_8", labels=LABELS, **arguments):
    """A random model of one block whose answers differ widely between images."""
    options = {"device": "cpu", "depth": 1, "dim": 16, "num_classes": len(labels or LABELS), **arguments}
    model = convmixer.create_model(name, **options)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": labels}
    torch.nn.init.normal_(model.head.weight, std=3)
    return model


def noise(random, height=32, width=32):
    """Coarse coloured blocks, so that neither resizing nor mirroring leaves the picture as it was."""
    blocks = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def probabilities(model, images):
    """(N, C) in the order of LABELS, through `predict`."""
    answers = [dict(p) for p in convmixer.predict(model, images, topk=len(LABELS))]
    return np.array([[answer[label] for label in LABELS] for answer in answers], dtype=np.float64)


def truth(paths):
    return np.array([LABELS.index(path.parent.name) for path in paths])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six of the seven classes, with 3, 4, ... images of 32 x 32 pixels."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for extra, name in enumerate(PRESENT):
        (folder / "test" / name).mkdir(parents=True)
        for i in range(3 + extra):
            noise(random).save(folder / "test" / name / f"{i}.png")
    return folder


@pytest.fixture
def files(data):
    return sorted(data.rglob("*.png"))


def alike(a, b, tolerance=1e-5):
    """Whether two evaluations agree in all but speed."""
    a, b = (dataclasses.asdict(dataclasses.replace(e, images_per_second=0.0)) for e in (a, b))
    for name in ("loss", "calibration_error"):
        assert a.pop(name) == pytest.approx(b.pop(name), rel=tolerance, abs=tolerance)
    return a == b


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn(data, files):
    model = build()
    expected, p = truth(files), probabilities(model, files)
    p /= p.sum(1, keepdims=True)
    labels = range(len(LABELS))
    result = validate(model, data)
    assert result.count == len(files) == 33
    assert result.top1 == pytest.approx(100 * accuracy_score(expected, p.argmax(1)))
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(expected, p, k=5, labels=labels))
    assert 0 < result.top1 < result.top5 < 100
    assert result.loss == pytest.approx(log_loss(expected, p, labels=labels), rel=1e-4)

    confusion = confusion_matrix(expected, p.argmax(1), labels=labels)
    rows = [
        (label, pytest.approx(100 * row[i] / row.sum()), row.sum())
        for i, (label, row) in enumerate(zip(LABELS, confusion, strict=True))
        if row.sum()  # the data lack "nobody"
    ]
    assert [dataclasses.astuple(c) for c in result.classes] == rows
    assert result.flip is None
    assert result.images_per_second > 0


def test_calibration_error_by_hand():
    """Three of four right at 0.95, one of two at 0.55, one wrong at 0.3: (4 x 0.2 + 2 x 0.05 + 1 x 0.3) / 7."""
    confidence = torch.tensor([0.95, 0.3, 0.95, 0.55, 0.95, 0.55, 0.95])
    correct = torch.tensor([True, False, True, True, False, False, True])
    assert calibration_error(confidence, correct) == pytest.approx(1.2 / 7)
    with pytest.raises(ArgumentError, match="no images, and so no calibration error"):
        calibration_error(confidence[:0], correct[:0])
    with pytest.raises(ArgumentError, match="bins=0: give a whole number of at least 1"):
        calibration_error(confidence, correct, bins=0)


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "error"),
    [
        ([0.75] * 4, [1, 1, 1, 0], 15, 0),
        ([1.0, 1.0], [1, 1], 15, 0),
        ([1.0, 1.0], [0, 0], 15, 1),
        ([0.5, 0.5625], [1, 0], 1, 0.03125),  # within a bin the gaps cancel
        ([0.5, 0.5625], [1, 0], 2, 0.53125),  # between bins they do not; 0.5 lies in the lower one
    ],
)
def test_calibration_error_in_closed_form(confidence, correct, bins, error):
    found = calibration_error(torch.tensor(confidence), torch.tensor(correct), bins)
    assert found == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_a_model(data, files):
    model = build()
    p = probabilities(model, files)
    confidence, correct = p.max(1), p.argmax(1) == truth(files)
    bins = np.digitize(confidence, np.arange(1, 15) / 15, right=True)
    gaps = [abs(confidence[bins == b].mean() - correct[bins == b].mean()) * (bins == b).sum() for b in set(bins)]
    assert validate(model, data).calibration_error == pytest.approx(100 * sum(gaps) / len(files), abs=1e-3)


def test_flip_is_the_mean_of_the_probabilities_of_both_sides(data, files):
    model = build()
    mirrored = [ImageOps.mirror(Image.open(file)) for file in files]
    plain, other, expected = probabilities(model, files), probabilities(model, mirrored), truth(files)
    p = (plain + other) / 2
    result = validate(model, data, flip=True)
    assert alike(dataclasses.replace(result, flip=None), validate(model, data))
    assert result.flip.loss == pytest.approx(-np.log(p[np.arange(len(p)), expected]).mean(), rel=1e-4)
    assert result.flip.top1 == pytest.approx(100 * (p.argmax(1) == expected).mean())
    assert result.flip.top5 == pytest.approx(100 * (np.argsort(-p)[:, :5] == expected[:, None]).any(1).mean())
    assert abs(result.flip.loss - result.loss) > 1e-3


def test_flip_changes_nothing_about_symmetric_images(tmp_path):
    random = np.random.default_rng(1)
    for name in PRESENT:
        (tmp_path / "test" / name).mkdir(parents=True)
        half = np.asarray(noise(random, 32, 16))
        Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(tmp_path / "test" / name / "a.png")
    result = validate(build(), tmp_path, flip=True)
    assert dataclasses.astuple(result.flip) == pytest.approx(dataclasses.astuple(result)[:4], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 33])
def test_batches_do_not_change_the_figures(data, batch_size):
    model = build()
    assert alike(validate(model, data, batch_size=batch_size), validate(model, data), 1e-4)


def test_the_loop_and_validate_agree_on_images_of_the_right_size(data):
    model = build()
    scores = evaluate(model, load_images(data, "test", (3, 32, 32), classes=LABELS))
    result = validate(model, data)
    assert (result.count, result.top1) == (scores["count"], pytest.approx(scores["top1"]))
    assert result.loss == pytest.approx(scores["loss"], rel=1e-4)


def test_the_mode_is_restored_and_half_precision_is_near(data):
    model = build()
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    exact, near = validate(model, data), validate(model, data, precision="bfloat16")
    assert model.training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert near.loss != exact.loss
    assert near.loss == pytest.approx(exact.loss, rel=0.05)


# ---- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convmixer_768_32", "convmixer_256_8"])  # 224 pixels cropped, 32 pixels squashed
@pytest.mark.parametrize("kind", ["wide", "high", "turned", "transparent", "grey"])
def test_validate_sees_what_predict_sees(tmp_path, name, kind):
    image = noise(np.random.default_rng(3), *((350, 270) if kind == "high" else (260, 420)))
    file = tmp_path / "test" / "beta" / "a.png"
    file.parent.mkdir(parents=True)
    options = {}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # the camera was held upright
    elif kind == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif kind == "grey":
        image = image.convert("L")
    image.save(file, **options)
    for model in (build(name), build(name, in_chans=1)):
        probability = dict(convmixer.predict(model, file, topk=len(LABELS)))["beta"]
        assert validate(model, tmp_path).loss == pytest.approx(-math.log(probability), rel=1e-4)


# ---- classes --------------------------------------------------------------------------------------------------------


def test_a_class_that_the_model_does_not_know(data):
    model = build(labels=("alpha", "beta", "gamma"))
    with pytest.raises(DataError, match="has the classes delta, epsilon, zeta; the model knows alpha, beta, gamma"):
        validate(model, data)


def test_a_model_without_names_has_those_of_the_data_if_there_are_as_many(data):
    result = validate(build(labels=None, num_classes=6), data)
    assert [c.label for c in result.classes] == PRESENT
    with pytest.raises(DataError, match="has 6 classes, the model has 7 and no names for them: pass classes="):
        validate(build(labels=None), data)


def test_names_may_be_given(data):
    model = build()
    unnamed = build(labels=None)
    unnamed.load_state_dict(model.state_dict())
    assert alike(validate(unnamed, data, classes=LABELS), validate(model, data))
    with pytest.raises(ArgumentError, match="2 class names for a model with 7 classes"):
        validate(model, data, classes=("alpha", "beta"))


@pytest.mark.parametrize("folders", [("n01443537", "n02123045"), ("goldfish, Carassius auratus", "tabby, tabby cat")])
def test_imagenet_by_number_and_by_name(data, files, tmp_path, folders):
    for folder in folders:
        (tmp_path / "test" / folder).mkdir(parents=True)
        shutil.copy(files[0], tmp_path / "test" / folder)
    model = build("convmixer_768_32", labels=None, num_classes=1000)
    model.pretrained_cfg["tag"] = "in1k"
    result = validate(model, tmp_path)
    assert [c.label for c in result.classes] == ["goldfish, Carassius auratus", "tabby, tabby cat"]
    probability = dict(convmixer.predict(model, files[0], topk=1000))
    losses = [-math.log(probability[c.label]) for c in result.classes]
    assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-4)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size=0: give a whole number of at least 1"),
        ({"batch_size": True}, ArgumentError, "batch_size=True: give a whole number of at least 1"),
        ({"precision": "fp8"}, ArgumentError, "unknown precision 'fp8'; valid: auto, float32, bfloat16"),
        ({"split": "tset"}, DataError, "unknown split 'tset'"),
        ({"split": "train"}, DataError, "no train split in"),
    ],
)
def test_senseless_arguments(data, options, error, text):
    with pytest.raises(error, match=text):
        validate(build(), data, **options)


def test_no_data_no_images_and_a_broken_one(data, tmp_path):
    with pytest.raises(DataError, match="no data at"):
        validate(build(), tmp_path / "none")
    (tmp_path / "empty" / "beta").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images in the test split of .*empty"):
        validate(build(), tmp_path / "empty")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "test" / "alpha" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot read image 1 of"):
        validate(build(), tmp_path / "data")


def test_a_model_without_a_head(data):
    with pytest.raises(ArgumentError, match="this model has no classes"):
        validate(convmixer.create_model("convmixer_256_8", depth=1, num_classes=0, device="cpu"), data)


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments, status=0):
    return command.run("validate", *arguments, "--device", "cpu", status=status)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one epoch, and its data."""
    root, random = tmp_path_factory.mktemp("trained"), np.random.default_rng(2)
    for split, count in (("train", 10), ("test", 3)):
        for name in ("left", "right"):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                noise(random).save(root / "data" / split / name / f"{i}.png")
    recipe = get_recipe("cifar10-cpu", model="convmixer_128_8_ks7_p2", epochs=1, batch_size=8, image_sizes=((0, 8),))
    return train(recipe, root / "data", root / "run", device="cpu", report=lambda _: None), root


def test_a_run_is_validated_by_its_folder(finished, tmp_path):
    result, root = finished
    shown = run(root / "run", "--data", root / "data", "--flip", "--json", "--output", tmp_path / "result.json").stdout
    record = json.loads(shown)
    assert json.loads((tmp_path / "result.json").read_text()) == record
    assert record["top1"] == pytest.approx(result.test_accuracy["data"])
    asked = {"model": str(root / "run"), "checkpoint": None, "data": str(root / "data")}
    asked |= {"split": "test", "labels": None, "precision": "float32"}
    assert {name: record.pop(name) for name in asked} == asked

    model = convmixer.create_model("convmixer_128_8_ks7_p2", checkpoint=result.weights, device="cpu")
    expected = json.loads(json.dumps(dataclasses.asdict(validate(model, root / "data", flip=True))))
    assert record.pop("images_per_second") > 0
    del expected["images_per_second"]
    assert record == expected

    by_name = run("convmixer_128_8_ks7_p2", "--checkpoint", result.weights, "--data", root / "data", "--json").stdout
    assert json.loads(by_name)["classes"] == record["classes"]


def test_table(finished):
    _, root = finished
    text = run(root / "run", "--data", root / "data", "--flip").stdout
    assert "with mirror images" in text
    for line in (
        r"top-1 +\d+\.\d\d % +\d+\.\d\d %",
        r"loss +\d\.\d{4} +\d\.\d{4}",
        r"images +6",
        r"left +\d+\.\d\d % +3",
    ):
        assert re.search(line, text)
    assert "mirror" not in run(root / "run", "--data", root / "data").stdout


def test_of_many_classes_the_worst_are_shown(tmp_path):
    random = np.random.default_rng(0)
    for i in range(21):
        (tmp_path / "test" / f"class {i:02}").mkdir(parents=True)
        noise(random).save(tmp_path / "test" / f"class {i:02}" / "a.png")
    weights = tmp_path / "model.safetensors"
    model = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=21)
    convmixer.hub.checkpoints.save_weights(model, weights)
    text = run("convmixer_256_8", "--checkpoint", weights, "--data", tmp_path).stdout
    rows = re.findall(r"class \d\d +(\S+) % +1 *$", text, re.MULTILINE)
    assert rows == ["0.00"] * 10
    assert "worst 10 of 21 classes" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("convmixer_256_9", "--data", "x"), "did you mean convmixer_256_8"),
        (("convmixer_256_8",), "Missing option '--data'"),
        (("convmixer_256_8", "--data", "none"), "no data at 'none'"),
        ((".", "--data", "none"), "'.' is not the folder of a run, which has a recipe.json"),
        (("convmixer_256_8", "--data", "x", "--precision", "fp8"), "'fp8' is not one of"),
        (("convmixer_256_8", "--data", "x", "--checkpoint", "none"), "no weights file at 'none'"),
    ],
)
def test_senseless_commands(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, status=2)
    assert text in result.stderr
    assert result.stdout == ""


def test_the_record_of_a_table_in_a_path(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nblack.png,cat\n")
    options = {"split": "test", "labels": table, "precision": "float32", "device": "cpu", "report": lambda _: None}
    found = compare("convmixer_128_8_ks7_p2", str(tmp_path), **options)
    assert json.loads(json.dumps(found.record()))["labels"] == str(table)
