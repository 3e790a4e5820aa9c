"""Predictions against the bare model, for one image, many, and streams of them."""

import copy
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from torch import nn

import convmixer
from convmixer.errors import ArgumentError, ConvMixerError, ImageError
from convmixer.evaluation import validate
from convmixer.hub.checkpoints import save_weights
from convmixer.hub.write_config import config_of
from convmixer.inference import label_names, predict_files
from convmixer.plots import class_probabilities
from convmixer.registry import CIFAR10_CLASSES

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# ---- predictions ----------------------------------------------------------------------------------------------------


def small(**arguments):
    """convmixer_256_8 with fewer channels and blocks, to be quick; preprocessing and labels are the same."""
    model = convmixer.create_model("convmixer_256_8", device="cpu", dim=32, depth=2, **arguments)
    model.pretrained_cfg["label_names"] = CIFAR10_CLASSES  # as weights would bring them
    return model


def lively(model):
    """A random head with weights so large that classes are far apart."""
    torch.manual_seed(1)
    nn.init.normal_(model.head.weight, std=3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(small())


@pytest.fixture(scope="module")
def tiles(photo):
    """Nine pieces of a photograph, 32 x 32 pixels."""
    return [photo[y : y + 32, x : x + 32] for y in (50, 150, 250) for x in (100, 200, 300)]


@torch.no_grad()
def probabilities(model, tile):
    """Class probabilities of one tile by formula: normalised with CIFAR-10's figures, and softmax."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    x = ((torch.from_numpy(tile / 255).float() - mean) / std).permute(2, 0, 1)
    powers = model.eval()(x[None])[0].double().exp()
    return powers / powers.sum()


def close(mine, other, tolerance=1e-4):
    """The same labels in the same order, with the same probabilities."""
    assert [label for label, _ in mine] == [label for label, _ in other]
    assert [p for _, p in mine] == pytest.approx([p for _, p in other], abs=tolerance)


def test_predictions_are_those_of_the_model(model, tiles):
    for tile, prediction in zip(tiles, convmixer.predict(model, tiles, topk=10), strict=True):
        expected = probabilities(model, tile)
        assert prediction == sorted(prediction, key=lambda pair: -pair[1])
        assert {label: p for label, p in prediction} == pytest.approx(
            dict(zip(CIFAR10, expected.tolist(), strict=True)), abs=1e-4
        )
        assert sum(p for _, p in prediction) == pytest.approx(1)


def test_the_same_photograph_by_any_way(model, cat):
    with Image.open(cat) as image:
        by_pillow = convmixer.predict(model, image)
        array = np.asarray(image.convert("RGB"))
    assert len(by_pillow) == 5
    for source in (cat, str(cat), array, array / 255, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert convmixer.predict(model, source) == by_pillow


def test_one_image_and_lists(model, tiles):
    one = convmixer.predict(model, tiles[0])
    assert all(isinstance(label, str) and isinstance(p, float) for label, p in one)
    assert convmixer.predict(model, [tiles[0]]) == [one]
    assert convmixer.predict(model, (tiles[0],)) == [one]
    assert convmixer.predict(model, []) == []


def test_topk(model, tiles):
    every = convmixer.predict(model, tiles[0], topk=10)
    assert convmixer.predict(model, tiles[0], topk=1) == every[:1]
    assert convmixer.predict(model, tiles[0], topk=3) == every[:3]
    assert convmixer.predict(model, tiles[0], topk=1000) == every
    assert sorted(label for label, _ in every) == CIFAR10


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 100])
def test_batches_do_not_change_answers(model, tiles, batch_size):
    together = convmixer.predict(model, tiles, batch_size=batch_size)
    for tile, prediction in zip(tiles, together, strict=True):
        close(prediction, convmixer.predict(model, tile))


def test_images_of_different_sizes_share_a_batch(model, cat):
    paths = sorted(cat.parent.glob("*.png"))
    assert len(paths) >= 3
    for path, prediction in zip(paths, convmixer.predict(model, paths), strict=True):
        close(prediction, convmixer.predict(model, path))


# ---- one image, many, a stream ---------------------------------------------------------------------------------------


def test_bytes_and_files_are_one_image(model, cat):
    expected = convmixer.predict(model, cat)
    content = cat.read_bytes()
    file = io.BytesIO(content)
    file.seek(100)  # as after writing it
    for source in (content, bytearray(content), memoryview(content), file, file):
        assert convmixer.predict(model, source) == expected
    with cat.open("rb") as opened:
        for prediction in convmixer.predict(model, [opened, content]):
            close(prediction, expected)
        assert not opened.closed


def test_a_generator_is_answered_as_it_goes(model, tiles):
    """Without an end, and with no more images in memory than a batch."""
    taken = itertools.count()

    def camera():
        for tile in itertools.cycle(tiles):
            next(taken)
            yield tile

    answers = convmixer.predict(model, camera(), batch_size=2)
    expected = convmixer.predict(model, tiles, batch_size=2)
    for i, answer in enumerate(itertools.islice(answers, 25)):
        close(answer, expected[i % len(tiles)])
    assert next(taken) == 26


def test_a_stream_keeps_no_images(model, tiles):
    alive = []

    class Counted(np.ndarray):
        def __del__(self):
            alive.remove(id(self))

    def stream():
        for i in range(40):
            image = tiles[i % len(tiles)].copy().view(Counted)
            alive.append(id(image))
            yield image

    most = 0
    for _ in convmixer.predict(model, stream(), batch_size=4):
        most = max(most, len(alive))
    assert most <= 5


@pytest.mark.parametrize("wrap", [iter, lambda x: map(np.asarray, x), lambda x: dict(enumerate(x)).values()])
def test_any_iterable_gives_an_iterator(model, tiles, wrap):
    answers = convmixer.predict(model, wrap(tiles), topk=2)
    assert iter(answers) is answers
    for mine, other in zip(answers, convmixer.predict(model, tiles, topk=2), strict=True):
        close(mine, other)
    assert list(convmixer.predict(model, wrap([]))) == []


def test_an_array_or_a_column_of_paths_is_many_images(model, cat):
    pandas = pytest.importorskip("pandas", reason="the train extra is not installed")
    paths = [str(path) for path in sorted(cat.parent.glob("*.png"))]
    expected = convmixer.predict(model, paths)
    for column in (np.array(paths), np.array(paths, dtype=object), pandas.Series(paths)):
        assert list(convmixer.predict(model, column)) == expected


def test_a_stream_leaves_the_model_as_it_was_between_batches(model, tiles):
    model.train()
    answers = convmixer.predict(model, iter(tiles), batch_size=3)
    next(answers)
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(ImageError, match=r"None is not an image\. cv2\.imread returns None where there is no such"):
        list(convmixer.predict(model, iter([tiles[0], None])))
    assert model.training


def test_senseless_arguments_of_a_stream_are_errors_at_once(model, tiles):
    with pytest.raises(ArgumentError, match="topk=0"):
        convmixer.predict(model, iter(tiles), topk=0)


def test_a_large_photograph_is_decoded_at_a_smaller_scale(model, cat, tmp_path):
    """It saves time and moves probabilities little; `draft=False` is the way of other files, to the bit."""
    with Image.open(cat) as image:
        large = image.convert("RGB").resize((2000, 1400), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=90)
    with Image.open(tmp_path / "large.jpg") as image:
        image.save(tmp_path / "same.png")
    exact = convmixer.predict(model, tmp_path / "same.png", topk=10)
    assert convmixer.predict(model, tmp_path / "large.jpg", topk=10, draft=False) == exact
    drafted = convmixer.predict(model, tmp_path / "large.jpg", topk=10)
    assert drafted != exact
    assert dict(drafted) == pytest.approx(dict(exact), abs=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiles, training):
    model = small(drop_rate=0.9).train(training)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = convmixer.predict(model, tiles)
    assert convmixer.predict(model, tiles) == first  # no dropout
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.train()(torch.rand(2, 3, 32, 32)).sum().backward()  # still trainable


def test_the_model_is_left_as_it_was_after_an_error(model, tiles):
    model.train()
    with pytest.raises(ImageError):
        convmixer.predict(model, [tiles[0], None])
    assert model.training


def test_layers_frozen_in_evaluation_mode_stay_so(tiles):
    """Fine-tuning keeps the stem's BatchNorm statistics while the rest trains."""
    model = small().train()
    model.stem.eval()
    convmixer.predict(model, tiles[0])
    assert model.training
    assert not model.stem[2].training


def test_bfloat16(model, tiles):
    half = small(dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for tile, prediction in zip(tiles, convmixer.predict(half, tiles, topk=10), strict=True):
        assert sum(p for _, p in prediction) == pytest.approx(1, abs=1e-5)
        expected = dict(zip(CIFAR10, probabilities(model, tile).tolist(), strict=True))
        assert {label: p for label, p in prediction} == pytest.approx(expected, abs=0.05)


def test_one_channel(photo):
    model = lively(small(in_chans=1))
    colour = Image.fromarray(photo[50:82, 100:132])
    prediction = convmixer.predict(model, colour, topk=10)
    assert convmixer.predict(model, ImageOps.grayscale(colour), topk=10) == prediction
    assert sum(p for _, p in prediction) == pytest.approx(1)


def test_other_channels_need_tensors(arrow):
    model = small(in_chans=5)
    with pytest.raises(ArgumentError, match="this model takes 5: call it with tensors"):
        convmixer.predict(model, arrow)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"features_only": True, "out_indices": (0,)}])
def test_models_without_classes(arrow, arguments):
    model = small(**arguments)
    with pytest.raises(ArgumentError, match=r"this model has no classes: build it without features_only"):
        convmixer.predict(model, arrow)


@pytest.mark.parametrize("wrong", [{"topk": 0}, {"topk": -1}, {"topk": True}, {"batch_size": 0}])
def test_senseless_counts(model, arrow, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"{name}={value}: give a whole number of at least 1"):
        convmixer.predict(model, arrow, **wrong)


@pytest.mark.parametrize("tensor", ["blocks.1.1.weight", "blocks.1.3.running_mean", "head.bias"])
def test_nan_is_an_error(tiles, tensor, tmp_path):
    """The class would be the first one, with the probability nan."""
    broken = small()
    broken.state_dict()[tensor].view(-1)[0] = math.nan
    Image.fromarray(tiles[0]).save(tmp_path / "tile.png")
    (tmp_path / "labels.csv").write_text("image,label\ntile.png,cat\n")
    for call in (
        lambda: convmixer.predict(broken, tiles),
        lambda: list(predict_files(broken, [str(tmp_path / "tile.png")])),
        lambda: validate(broken, tmp_path / "labels.csv", report=lambda line: None),
        lambda: class_probabilities(broken, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    ):
        with pytest.raises(ConvMixerError, match=rf"answers NaN or infinity: its {re.escape(tensor)} is damaged"):
            call()


def test_a_variance_below_zero_is_an_error(tiles):
    broken = small()
    broken.blocks[0][3].running_var[3] = -1
    with pytest.raises(ConvMixerError, match=r"its blocks\.0\.3\.running_var is damaged"):
        convmixer.predict(broken, tiles)


def test_values_that_become_too_large(tiles):
    half = small(dtype=torch.float16)
    with torch.no_grad():
        half.stem[2].weight.fill_(6e4)
    with pytest.raises(ConvMixerError, match=r"values become too large on the way \(image 0, 1, 2, 3, 4 of 9\)"):
        convmixer.predict(half, tiles)


def test_classes_may_be_masked(model, tiles):
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.head.bias[[0, 3]] = -math.inf
    for rows in convmixer.predict(masked, tiles, topk=10):
        assert {label for label, p in rows if p == 0} == {"airplane", "cat"}
        assert sum(p for _, p in rows) == pytest.approx(1)
    masked.head.bias.data.fill_(-math.inf)
    with pytest.raises(ConvMixerError, match="answers NaN or infinity"):
        convmixer.predict(masked, tiles)


def test_missing_and_broken_files_are_named(model, tiles, tmp_path):
    with pytest.raises(ImageError, match=r"no image at .*none\.png"):
        convmixer.predict(model, tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"broken\.png' is not an image"):
        convmixer.predict(model, [tiles[0], tmp_path / "broken.png"])


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_of_cifar10(model):
    assert list(label_names(model)) == CIFAR10


@pytest.mark.parametrize("classes", [2, 10, 11])
def test_labels_after_a_change_of_head(classes, arrow):
    expected = [f"class {i}" for i in range(classes)]
    if classes != 10:  # else the classes are those of the weights
        built = small(num_classes=classes)
        assert list(label_names(built)) == expected
    swapped = small()
    swapped.reset_classifier(classes)
    assert list(label_names(swapped)) == expected
    assert sorted(label for label, _ in convmixer.predict(swapped, arrow, topk=99)) == sorted(expected)


def test_descriptions_go_with_the_names_of_the_old_classes():
    model = small()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_descriptions": tuple(f"a {name}" for name in CIFAR10)}
    assert len(config_of(model, CIFAR10, "")["label_descriptions"]) == 10
    assert "label_descriptions" not in config_of(model, CIFAR10[::-1], "")
    model.reset_classifier(2)
    assert "label_descriptions" not in config_of(model, ["cat", "dog"], "")


def test_labels_of_a_new_head_with_one_output(tmp_path):
    """Two names fit one output, too, but these are of the head that is gone."""
    weights = tmp_path / "two.safetensors"
    save_weights(small(num_classes=2), weights, {"label_names": ["cat", "dog"]})
    sizes = {"checkpoint": weights, "device": "cpu", "dim": 32, "depth": 2}
    assert label_names(convmixer.create_model("convmixer_256_8", **sizes)) == ("cat", "dog")
    assert label_names(convmixer.create_model("convmixer_256_8", num_classes=1, **sizes)) == ("class 0", "class 1")


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_labels_of_a_head_that_was_replaced_by_hand(classes, arrow, tmp_path):
    """As most tutorials of PyTorch do it: nothing tells the model that its classes are others."""
    model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
    model.head = torch.nn.Linear(256, classes)
    expected = [f"class {i}" for i in range(classes)]
    for one in model, convmixer.optimize(model):
        assert list(label_names(one)) == expected
        assert sorted(label for label, _ in convmixer.predict(one, arrow, topk=999)) == sorted(expected)
    convmixer.export_model(model, tmp_path / "model.pt2")
    torch.export.load(tmp_path / "model.pt2", extra_files=(files := {"metadata.json": ""}))
    metadata = json.loads(files["metadata.json"])
    assert metadata["num_classes"] == str(classes)
    assert "label_names" not in metadata
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple(f"kind {i}" for i in range(classes))}
    assert label_names(model)[1] == "kind 1"
    convmixer.save_pretrained(model, tmp_path / "published")
    again = convmixer.create_model(f"local-dir:{tmp_path}/published", pretrained=True, device="cpu")
    assert label_names(again) == label_names(model)


def test_a_head_whose_outputs_are_not_the_classes_is_refused(model, arrow):
    model = copy.deepcopy(model)
    model.head = torch.nn.Sequential(model.head, torch.nn.GELU(), torch.nn.Linear(model.num_classes, 3))
    with pytest.raises(ArgumentError, match=r"3 outputs, and its num_classes says 10.*set model\.num_classes"):
        convmixer.predict(model, arrow)
    model.num_classes = 3
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("a", "b", "c")}
    assert sorted(label for label, _ in convmixer.predict(model, arrow)) == ["a", "b", "c"]


def test_labels_of_imagenet(cat):
    new = small(num_classes=1000)
    new.pretrained_cfg = {**new.pretrained_cfg, "tag": "in1k"}
    new.reset_classifier(1000)
    assert label_names(new)[0] == "class 0"
    model = lively(timm.create_model("convmixer_1024_20_ks9_p14"))
    names = label_names(model)
    assert len(names) == 1000
    assert len(set(names)) == 999  # a crane is a bird and a machine
    known = {0: "tench", 7: "cock", 207: "golden retriever", 281: "tabby", 504: "coffee mug", 999: "toilet tissue"}
    for index, start in known.items():
        assert names[index].startswith(start)
    prediction = convmixer.predict(model, cat, topk=1000)
    assert sorted(label for label, _ in prediction) == sorted(names)
    assert sum(p for _, p in prediction) == pytest.approx(1, abs=1e-4)


def test_no_labels_where_nothing_says_what_the_classes_are():
    untrained = convmixer.create_model("convmixer_1024_16", device="meta")
    assert label_names(untrained)[:2] == ("class 0", "class 1")
    assert len(label_names(untrained)) == 1000
