"""Figures: the data behind what is drawn, the files, and what is said where nothing can be drawn."""

import copy
import dataclasses
import json
import math
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from torch import nn

import convmixer
from convmixer import plots
from convmixer.errors import ArgumentError, DataError, DependencyError, ImageError
from convmixer.hub.checkpoints import save_weights
from convmixer.training.history import Epoch, read_history, write_history

ROOT = Path(__file__).parent.parent
RUN = ROOT / "docs" / "runs" / "keras-post" / "dropout-0-seed-0"
NAMES = [field.name for field in dataclasses.fields(Epoch)]
HISTORY = [Epoch(i + 1, 0.01 / (i + 1), 2.5 - i / 4, 30.0 + i, 2.25 - i / 8, 25.0 + i, 1.5, 100.25) for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")


def tile(picture, index, height, width, columns):
    """The tile of that index in a picture of tiles one pixel apart."""
    top, left = index // columns * (height + 1), index % columns * (width + 1)
    return np.asarray(picture[top : top + height, left : left + width])


# ---- history --------------------------------------------------------------------------------------------------------


def without_validation(history):
    return [dataclasses.replace(row, validation_loss=math.nan, validation_accuracy=math.nan) for row in history]


def test_history_round_trip(tmp_path):
    write_history(tmp_path / "metrics.csv", HISTORY)
    assert [dataclasses.astuple(row) for row in read_history(tmp_path / "metrics.csv")] == [
        pytest.approx(dataclasses.astuple(row), abs=1e-6) for row in HISTORY
    ]
    write_history(tmp_path / "metrics.csv", without_validation(HISTORY))
    assert all(math.isnan(row.validation_loss) for row in read_history(str(tmp_path / "metrics.csv")))


def test_history_of_a_finished_run():
    history = read_history(RUN / "metrics.csv")
    result = json.loads((RUN / "result.json").read_text())
    assert [row.epoch for row in history] == list(range(1, result["recipe"]["epochs"] + 1))
    assert history[-1].validation_accuracy == pytest.approx(result["validation_accuracy"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "its first line is not epoch,learning_rate,"),
        (b"epoch,loss\n1,2\n", "its first line is not epoch,learning_rate,"),
        (",".join(NAMES).encode() + b"\n1,2,3\n", "the row '1,2,3' has 3 values, not 8"),
        (",".join(NAMES).encode() + b"\n1,2,3,4,5,6,7,fast\n", "could not convert string to float: 'fast'"),
        (",".join(NAMES).encode() + b"\n1.5,2,3,4,5,6,7,8\n", "'1.5'"),
        (b"\xff\xfe\x00", "can't decode"),
    ],
)
def test_foreign_history(tmp_path, content, text):
    path = tmp_path / "foreign.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"foreign\.csv' is not a history of a run: .*" + re.escape(text)):
        read_history(path)


def test_history_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no history at .*metrics\.csv': give the metrics\.csv of a run of convmixer"):
        read_history(tmp_path / "metrics.csv")
    with pytest.raises(
        DataError, match=r"is not a history of a run: .*Give the metrics\.csv that convmixer train wrote"
    ):
        read_history(tmp_path)


@pytest.mark.parametrize("count", [1, 4])
def test_curves_are_the_history(count):
    history = HISTORY[:count]
    loss, accuracy, rate = plots.plot_history(history).axes
    for axes, fields in (
        (loss, ("train_loss", "validation_loss")),
        (accuracy, ("train_accuracy", "validation_accuracy")),
        (rate, ("learning_rate",)),
    ):
        assert len(axes.lines) == len(fields)
        for line, field in zip(axes.lines, fields, strict=True):
            assert list(line.get_xdata()) == [row.epoch for row in history]
            assert list(line.get_ydata()) == [getattr(row, field) for row in history]
            assert line.get_marker() != "None"  # one epoch has no line
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [text.get_text() for text in loss.get_legend().texts] == ["train", "validation"]


def test_a_run_without_validation_has_no_curve_of_it(tmp_path):
    figure = plots.plot_history(without_validation(HISTORY))
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    plots.write_figure(figure, tmp_path / "history.png")


def test_no_epochs():
    with pytest.raises(ArgumentError, match="this history has no epochs: draw it after the first one"):
        plots.plot_history([])


# ---- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """A classifier's answers to handwritten digits: (uint8 images, labels, probabilities, class names)."""
    bunch = load_digits()
    pixels = bunch.data / 16
    classifier = LogisticRegression(max_iter=500).fit(pixels[:200], bunch.target[:200])
    images = torch.from_numpy((bunch.images[200:] * 15).astype(np.uint8))[:, None]
    classes = [f"digit {i}" for i in range(10)]
    return images, bunch.target[200:], classifier.predict_proba(pixels[200:]), classes


def test_confusion_is_that_of_scikit_learn(digits):
    _, labels, probabilities, classes = digits
    predictions = probabilities.argmax(1)
    axes = plots.plot_confusion(torch.from_numpy(labels), predictions, classes).axes[0]
    shown = np.asarray(axes.images[0].get_array())
    assert shown == pytest.approx(100 * confusion_matrix(labels, predictions, normalize="true"))
    counts = np.zeros((10, 10), dtype=int)
    for text in axes.texts:
        column, row = text.get_position()
        percent, counts[row, column] = text.get_text().split("%\n")
        assert float(percent) == pytest.approx(shown[row, column], abs=0.051)
    assert np.array_equal(counts, confusion_matrix(labels, predictions))
    assert [t.get_text() for t in axes.get_yticklabels()] == [t.get_text() for t in axes.get_xticklabels()] == classes
    assert axes.get_title() == f"top-1 {100 * (labels == predictions).mean():.2f} % of {len(labels)} images"


def test_confusion_of_many_classes_and_of_absent_ones():
    classes = [f"class {i}" for i in range(100)]
    labels = [i for i in range(100) if i != 7]
    predictions = [(i + 1) % 100 for i in labels]
    axes = plots.plot_confusion(np.uint8(labels), np.uint8(predictions), classes).axes[0]
    assert not axes.texts
    expected = 100 * np.roll(np.eye(100), 1, axis=1)
    expected[7] = 0
    assert np.array_equal(axes.images[0].get_array(), expected)


@pytest.mark.parametrize(
    ("labels", "predictions", "text"),
    [
        ([0, 1], [0], "labels (2,) and predictions (1,): give both as (N,), N at least 1"),
        ([], [], "labels (0,) and predictions (0,)"),
        ([0, 2], [0, 1], "labels from 0 to 2: give integers from 0 to 1"),
        ([0, 1], [-1, 1], "predictions from -1 to 1: give integers from 0 to 1"),
        ([0, 1], [0.5, 0.9], "predictions from 0.5 to 0.8999"),
    ],
)
def test_senseless_confusion(labels, predictions, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        plots.plot_confusion(labels, predictions, ["a", "b"])


def test_mistakes_are_the_most_confident_wrong_ones(digits):
    images, labels, probabilities, classes = digits
    figure = plots.plot_mistakes(images, labels, probabilities, classes, count=6)
    expected = []  # (probability, image), by a plain loop
    for i, label in enumerate(labels):
        best = max(range(10), key=lambda c: probabilities[i, c])
        if best != label:
            expected.append((probabilities[i, best], i, f"{classes[label]} -> {classes[best]}"))
    expected.sort(key=lambda found: -found[0])
    assert figure.get_suptitle() == f"{len(expected)} mistakes among {len(labels)} images"
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6
    for axes, (share, i, title) in zip(shown, expected, strict=False):
        assert np.array_equal(axes.images[0].get_array(), images[i, 0])
        assert axes.get_title().replace("\n", " ") == f"{title} {100 * share:.1f}%"


def test_few_mistakes_and_none(tmp_path):
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    probabilities = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]
    figure = plots.plot_mistakes(images, [0, 1, 1], probabilities, ["a", "b"])
    assert [axes.get_title() for axes in figure.axes] == ["b -> a 60.0%"]
    figure = plots.plot_mistakes(images, [0, 1, 0], probabilities, ["a", "b"])
    assert figure.get_suptitle() == "0 mistakes among 3 images"
    plots.write_figure(figure, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, "images (2, 3, 4, 4) of torch.float32: give uint8 (N, C, H, W)"),
        ({"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)}, "images (2, 4, 4, 3) have 4 channels: give 1 or 3"),
        ({"labels": [0]}, "2 images of 2 classes with labels (1,) and probabilities (2, 2): give (2,) and (2, 2)"),
        ({"classes": ["a"]}, "2 images of 1 classes with labels (2,) and probabilities (2, 2): give (2,) and (2, 1)"),
        ({"count": 0}, "count=0: give a whole number of at least 1"),
        ({"labels": [0, -1]}, "labels from -1 to 0: give integers from 0 to 1"),
        ({"labels": [0.0, 1.0]}, "labels from 0.0 to 1.0: give integers from 0 to 1"),
        ({"probabilities": [[3.0, 12.0], [7.0, 3.0]]}, "probabilities from 3.0 to 12.0: give those of"),
        ({"probabilities": [[float("nan"), 0.5], [0.5, 0.5]]}, "probabilities from nan to nan: give those of"),
        (
            {"classes": {"a": 1, "b": 0}},
            "classes={'a': 1, 'b': 0}: give a list of strings, in the order",
        ),
    ],
)
def test_senseless_mistakes(changes, text):
    given = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": [0, 1]}
    given |= {"probabilities": [[0.5, 0.5], [0.5, 0.5]], "classes": ["a", "b"]}
    with pytest.raises(ArgumentError, match=re.escape(text)):
        plots.plot_mistakes(**given | changes)


def test_class_activation_of_fused_blocks(model, cat):
    """They call no layers, on which Grad-CAM hangs its hooks."""
    twin = copy.deepcopy(model)
    twin.set_fused()
    expected, found = (plots.class_activation(net, cat, side=32) for net in (model, twin))
    np.testing.assert_allclose(found.heat, expected.heat, atol=1e-5)
    assert twin.fused


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_class_activation_where_gradients_are_off(model, cat, mode):
    expected = plots.class_activation(model, cat, side=32)
    with mode():
        found = plots.class_activation(model, cat, side=32)
    np.testing.assert_array_equal(found.heat, expected.heat)


def test_probabilities_are_those_of_predict(model, cat):
    with Image.open(cat) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB").resize((32, 32)))).permute(2, 0, 1)
    batch = torch.stack([pixels, pixels.flip(2), 255 - pixels])
    found = plots.class_probabilities(model, batch, batch_size=2)
    names = model.pretrained_cfg["label_names"]
    for row, prediction in zip(found, convmixer.predict(model, list(batch), topk=10), strict=True):
        assert dict(zip(names, row.tolist(), strict=True)) == pytest.approx(dict(prediction), abs=1e-5)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_filters_are_the_stem(model):
    picture = plots.plot_patch_embedding(model).axes[0].images[0].get_array()
    assert picture.shape == (16 * 3 - 1, 16 * 3 - 1, 3)
    for i, weight in enumerate(model.state_dict()["stem.0.weight"]):
        expected = (weight - weight.min()) / (weight.max() - weight.min())
        assert tile(picture, i, 2, 2, 16) == pytest.approx(expected.permute(1, 2, 0).numpy(), abs=1e-6)
    assert np.all(picture[2::3] == 1)


@pytest.mark.parametrize("channels", [1, 4])
def test_filters_of_other_channels_are_grey(channels):
    net = convmixer.ConvMixer(dim=5, depth=1, patch_size=3, in_chans=channels)
    with torch.no_grad():
        net.stem[0].weight[4] = 0.5  # constant: no contrast to stretch
    picture = plots.plot_patch_embedding(net).axes[0].images[0].get_array()
    assert picture.shape == (2 * 4 - 1, 3 * 4 - 1)
    for i, weight in enumerate(net.stem[0].weight.detach().mean(1)[:4]):
        grey = tile(picture, i, 3, 3, 3)
        assert (grey.min(), grey.max()) == (0, 1)
        assert np.corrcoef(grey.ravel(), weight.numpy().ravel())[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.array_equal(tile(picture, 4, 3, 3, 3), np.zeros((3, 3)))


def test_kernels_are_the_weights(model):
    state = model.state_dict()
    panels = [axes for axes in plots.plot_depthwise_kernels(model).axes if axes.get_title()]
    assert [int(axes.get_title().split()[1].rstrip(":")) for axes in panels] == [0, 2, 5, 7]
    for block, axes in zip((0, 2, 5, 7), panels, strict=True):
        weights = state[f"blocks.{block}.0.fn.0.weight"][:, 0].numpy()
        shown = axes.images[0]
        for i in range(256):
            assert np.array_equal(tile(shown.get_array(), i, 5, 5, 16), weights[i])
        low, high = shown.get_clim()
        assert high == -low == np.abs(weights).max()
        assert shown.cmap(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)  # zero is white


@pytest.mark.parametrize(("block", "expected"), [(0, 0), (6, 6), (-1, 7)])
def test_kernels_of_one_block(model, block, expected):
    axes = plots.plot_depthwise_kernels(model, block).axes[0]
    assert axes.get_title() == f"block {expected}: 256 of 256 kernels, 5x5"
    weight = model.state_dict()[f"blocks.{expected}.0.fn.0.weight"]
    assert np.array_equal(tile(axes.images[0].get_array(), 17, 5, 5, 16), weight[17, 0])


def test_shallow_and_wide_models():
    net = convmixer.ConvMixer(dim=300, depth=1, kernel_size=4, patch_size=2)
    panels = [axes.get_title() for axes in plots.plot_depthwise_kernels(net).axes if axes.get_title()]
    assert panels == ["block 0: 256 of 300 kernels, 4x4"]


def test_weights_of_half_precision():
    net = convmixer.ConvMixer(dim=4, depth=2, dtype=torch.bfloat16)
    kernels = plots.plot_depthwise_kernels(net, 1).axes[0].images[0].get_array()
    assert np.array_equal(tile(kernels, 3, 9, 9, 2), net.blocks[1][0].fn[0].weight[3, 0].detach().float())


def test_weights_that_are_not_there(model):
    for block in (8, -9):
        with pytest.raises(ArgumentError, match=rf"block={block}: this model has the blocks 0 to 7"):
            plots.plot_depthwise_kernels(model, block)
    for draw in (plots.plot_patch_embedding, plots.plot_depthwise_kernels):
        with pytest.raises(ArgumentError, match=r"Linear is not a ConvMixer: give a model of convmixer\.create_model"):
            draw(nn.Linear(2, 2))


# ---- class activation -----------------------------------------------------------------------------------------------


def activation(figure):
    return np.asarray(figure.axes[1].images[1].get_array())


def test_activation_of_average_pooling_has_a_closed_form(model, cat):
    """With a mean and a linear head, Grad-CAM is the head's row times the features: class activation mapping."""
    with Image.open(cat) as image, torch.no_grad():
        x = convmixer.create_transform(model)(image.convert("RGB"))[None]
        features = model.eval().forward_features(x)[0]  # (256, 16, 16)
        share = model(x).softmax(1)[0]
    names = model.pretrained_cfg["label_names"]
    for target in (None, 5):
        row = model.head.weight[3 if target is None else target].detach()
        expected = torch.einsum("c,chw->hw", row, features).relu()
        figure = plots.plot_class_activation(model, cat, target)
        coarse = nn.functional.interpolate(expected[None, None], (224, 224), mode="bilinear")[0, 0]
        assert activation(figure) == pytest.approx((coarse / coarse.max()).numpy(), abs=1e-4)
        assert figure.get_suptitle() == f"predicted: {names[3]} {100 * share[3]:.1f} %"
        shown = names[target or 3]
        assert figure.axes[1].get_title() == f"activation for {shown}, {100 * share[target or 3]:.1f} %"


def test_activation_lies_where_the_evidence_is():
    """A model that answers "bright" by a patch's brightness, and a picture with one bright corner."""
    net = convmixer.create_model("convmixer_256_8", device="cpu", dim=2, depth=1, num_classes=2)
    net.pretrained_cfg |= {"label_names": ("bright", "dark"), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        net.stem[0].weight[0] = 1
        net.blocks[0][1].weight[0, 0] = 1
        net.head.weight[0, 0] = 1
    net.requires_grad_(False)
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:16, 40:] = 255
    net.train()
    figure = plots.plot_class_activation(net, pixels, target=0)
    assert net.training
    heat = activation(figure)
    assert heat.max() == 1
    assert heat[:42, 154:].min() > 5 * heat[84:, :].max()
    assert np.unravel_index(heat.argmax(), heat.shape)[0] < 56
    picture = np.asarray(figure.axes[1].images[0].get_array())
    assert picture.shape == (224, 224, 3)
    assert picture[20, 190] == pytest.approx([1, 1, 1])
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (32, 32, 3)


def test_activation_of_grey_images_and_of_none(tmp_path):
    """A class without any evidence has an empty map."""
    net = convmixer.create_model("convmixer_256_8", device="cpu", dim=2, depth=1, num_classes=2, in_chans=1)
    with torch.no_grad():
        net.head.weight.zero_()
    figure = plots.plot_class_activation(net, np.zeros((8, 8), dtype=np.uint8), target=1)
    assert not activation(figure).any()
    assert figure.axes[1].get_title().startswith("activation for class 1, ")
    plots.write_figure(figure, tmp_path / "grey.png")


@pytest.mark.parametrize("side", [27, 270])
def test_activation_lies_on_what_the_model_saw(side):
    """The stem leaves out pixels that fill no patch: of 27 pixels those beyond three patches of 7."""
    sizes = {"dim": 1, "depth": 1, "kernel_size": 1, "patch_size": 7, "num_classes": 2, "act_layer": "identity"}
    net = convmixer.create_model("convmixer_256_8", device="cpu", **sizes).eval()
    net.pretrained_cfg |= {"input_size": (3, 27, 27), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.stem[0].weight.fill_(1 / 147)
        net.blocks[0][1].weight.fill_(1)
        net.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        for norm in (net.stem[2], net.blocks[0][0].fn[2], net.blocks[0][3]):
            norm.weight.fill_(1)
    pixels = np.zeros((27, 27, 3), dtype=np.uint8)
    pixels[7:14, 14:21] = 255
    heat = plots.class_activation(net, pixels, target=0, side=side).heat
    scale = len(heat) / 27
    centres = (np.arange(len(heat)) + 0.5) / scale
    assert heat[round(21 * scale) :].max() == heat[:, round(21 * scale) :].max() == 0
    seen = centres < 21
    top = [heat.max(axis) for axis in (0, 1)]
    assert [centres[found >= 0.99].mean() for found in top] == pytest.approx([17.5, 10.5], abs=3.5)
    assert seen.sum() == round(21 * scale)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_probabilities_of_pixels_that_are_no_bytes(model, dtype):
    with pytest.raises(ArgumentError, match=rf"pixels \(1, 3, 32, 32\) of {dtype}: give uint8"):
        plots.class_probabilities(model, torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_figures_are_png_files(tmp_path):
    with pytest.raises(ArgumentError, match=r"a\.svg': figures are PNG files, so give a name that ends in \.png"):
        plots.write_figure(plots.plot_confusion([0, 1], [0, 1], ("a", "b")), tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_a_candidate_of_a_benchmark_that_comes_twice():
    rows = [
        {"name": "convmixer eager", "dtype": "float32", "slowest": n, "images_per_second": n, "fastest": n}
        for n in (100.0, 120.0)
    ]
    case = {"batch_size": 1, "image_size": 32, "results": rows}
    machine = {"device": "a CPU", "threads": 2}
    axes = plots.plot_benchmark({"model": "m", "machine": machine, "cases": [case]}).axes[0]
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches] == [(0, 100), (1, 120)]


def test_activation_of_names_with_dollar_signs():
    """Which matplotlib would take for a formula."""
    net = convmixer.create_model("convmixer_256_8", device="cpu", dim=2, depth=1, num_classes=2)
    net.pretrained_cfg |= {"label_names": ("a $x$", "b $x$")}
    figure = plots.plot_class_activation(net, np.zeros((8, 8, 3), dtype=np.uint8))
    for title in (figure.get_suptitle(), figure.axes[1].get_title()):
        assert re.search(r" [ab] \\\$x\\\$", title)


def test_senseless_activation(model, cat, tmp_path):
    for target in (10, -1, 1.5, "cat"):
        with pytest.raises(ArgumentError, match=rf"target={target!r}: give the index of a class, 0 to 9"):
            plots.plot_class_activation(model, cat, target)
    headless = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=0)
    with pytest.raises(
        ArgumentError, match="this model has no classes: build it without features_only and with num_classes above 0"
    ):
        plots.plot_class_activation(headless, cat)
    backbone = convmixer.create_model("convmixer_256_8", device="cpu", features_only=True)
    with pytest.raises(ArgumentError, match="this model has no classes"):
        plots.plot_class_activation(backbone, cat)
    with pytest.raises(ArgumentError, match="give a ConvMixer as it was before optimize"):
        plots.plot_class_activation(convmixer.optimize(model), cat)
    with pytest.raises(ImageError, match="no image at"):
        plots.plot_class_activation(model, tmp_path / "none.png")


# ---- files and libraries --------------------------------------------------------------------------------------------


def test_figures_leave_pyplot_alone(tmp_path):
    """And so they can be drawn by any thread."""
    import matplotlib.pyplot

    def draw():
        plots.write_figure(plots.plot_history(HISTORY), tmp_path / "history.png")

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert matplotlib.pyplot.get_fignums() == []
    with Image.open(tmp_path / "history.png") as image:
        assert image.size == (1800, 540)
    assert [path.name for path in tmp_path.iterdir()] == ["history.png"]


def test_a_figure_that_cannot_be_written(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot write .*none.*: there is no folder"):
        plots.write_figure(plots.plot_history(HISTORY), tmp_path / "none" / "history.png")


def test_class_names_are_no_formulas(tmp_path):
    """What stands between two dollar signs would be parsed, and fail."""
    names = ["$\\frac{$", "a $ b", "c"]
    plots.write_figure(plots.plot_confusion([0, 1, 2], [0, 1, 1], names), tmp_path / "confusion.png")
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    mistakes = plots.plot_mistakes(images, [0, 1, 2], torch.eye(3)[[1, 2, 0]], names)
    plots.write_figure(mistakes, tmp_path / "mistakes.png")


def test_missing_libraries(model, cat, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(DependencyError, match=r"needs captum, which is missing: pip install 'convmixer\[train\]'"):
        plots.plot_class_activation(model, cat)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plots.plot_history(HISTORY), lambda: plots.plot_patch_embedding(model)):
        with pytest.raises(DependencyError, match=r"needs matplotlib, which is missing: pip install 'convmixer\[t"):
            draw()
    assert "pip install 'convmixer[train]'" in run("plot", RUN, status=2).stderr


# ---- the command ----------------------------------------------------------------------------------------------------


def written(result):
    """The files that a command says it wrote, each of which opens."""
    paths = [Path(line) for line in result.stdout.splitlines()]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
    return paths


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six test images of 8 x 8 noise in three of CIFAR-10's classes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, name in enumerate(("cat", "dog", "ship") * 2):
        (folder / "test" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "test" / name / f"{i}.png")
    return folder


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.csv", "recipe.json"):
        shutil.copy(RUN / name, folder / name)
    net = convmixer.create_model("convmixer_256_8", device="cpu", num_classes=3)
    save_weights(net, folder / "model.safetensors", {"label_names": ["cat", "dog", "ship"]})
    return folder


def test_plot_a_run_without_weights(tmp_path):
    result = run("plot", RUN, "--output", tmp_path / "made" / "here")
    assert written(result) == [tmp_path / "made" / "here" / "history.png"]
    assert list((tmp_path / "made" / "here").iterdir()) == written(result)


def test_plot_a_finished_run_with_everything(finished, pictures, cat):
    result = run("plot", finished, "--data", pictures, "--image", cat, "--device", "cpu")
    names = ["history", "patch_embedding", "depthwise_kernels", "class_activation", "confusion", "mistakes"]
    assert written(result) == [finished / "plots" / f"{name}.png" for name in names]
    assert sorted((finished / "plots").iterdir()) == sorted(written(result))


def test_plot_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("plots") / "convmixer_256_8.cifar10"
    expected = [folder / "patch_embedding.png", folder / "depthwise_kernels.png"]
    assert written(run("plot", "convmixer_256_8.cifar10", "--device", "cpu")) == expected


def test_plot_a_folder_of_the_hubs_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"architecture": "convmixer_128_8_ks7_p2", "num_classes": 3}
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(config))
    net = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", num_classes=3)
    save_weights(net, "mine/model.safetensors")
    paths = written(run("plot", "local-dir:mine", "--device", "cpu"))
    assert {path.parent for path in paths} == {Path("plots/local-dir_mine")}


def test_what_cannot_be_plotted(finished, pictures, cat, tmp_path):
    def complaint(*arguments):
        result = run("plot", *arguments, "--device", "cpu", status=2)
        assert result.stdout == "" or result.stdout.endswith("png\n")
        return result.stderr

    message = complaint("convmixer_256_9")
    assert "no folder or file 'convmixer_256_9', and no model: unknown model" in message
    assert "did you mean convmixer_256_8" in message
    assert "convmixer_512_12 has no weights" in complaint("convmixer_512_12")
    assert "no history at" in complaint(pictures)
    for options in (("--data", pictures), ("--image", cat)):
        message = complaint(RUN, "--output", tmp_path, *options)
        assert "--data and --image need weights, and " in message
        assert "leave them out, or give the name of a model" in message
    assert "no image at" in complaint(finished, "--image", tmp_path / "none.png")
    assert "no data at" in complaint(finished, "--data", tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in complaint(finished, "--output", tmp_path / "file")
    assert "set --output" in complaint(finished, "--output", tmp_path / "file" / "inside")
    for content in ("{}", "[]", "no JSON", None):
        (finished / "recipe.json").unlink()
        if content is not None:
            (finished / "recipe.json").write_text(content)
        message = complaint(finished)
        assert re.search(r"is not the folder of a run, which has a recipe\.json that names a model", message)
        if content is None:
            assert "FileNotFoundError" in message
