"""What the page shows of a model, without the page: no browser, no Gradio."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import convmixer
from convmixer import plots
from convmixer.demo import Classifier, open_classifiers
from convmixer.demo import classifier as module
from convmixer.errors import ArgumentError, DataError, DependencyError, ImageError, UnknownModelError, WeightsError
from convmixer.hub.checkpoints import save_weights

NAME = "convmixer_128_8_ks7_p2"


@pytest.fixture(scope="module")
def classifier():
    return open_classifiers([NAME], device="cpu", backends=["eager"])[NAME]


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    model = convmixer.ConvMixer(8, 2, 3, 2, num_classes=3)
    folder = tmp_path / "flowers"
    folder.mkdir()
    sizes = [["dim", 8], ["depth", 2], ["kernel_size", 3], ["num_classes", 3]]
    (folder / "recipe.json").write_text(json.dumps({"model": NAME, "model_args": sizes}))
    save_weights(model, folder / "model.safetensors", {"label_names": ["aster", "rose", "tulip"]})
    return folder


def test_the_answer_is_that_of_predict(classifier, photographs):
    model = convmixer.create_model(NAME, pretrained=True, device="cpu")
    for name in ("cat.png", "camera.png", "dog.jpg"):
        assert classifier.classify(photographs / name).predictions == convmixer.predict(model, photographs / name)


def test_the_map_is_that_of_the_figure(classifier, cat, monkeypatch):
    monkeypatch.setattr(module, "MAP_SIDE", 224)
    drawn, right = classifier.classify(cat).activation, plots.plot_class_activation(classifier.model, cat).axes[1]
    picture, heat = (np.asarray(image.get_array()) for image in right.images)
    assert drawn.size == heat.shape[::-1] == (224, 224)
    # The oracle: matplotlib blends the two images.
    figure = plots._figure(2.24, 2.24)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(picture, interpolation="nearest")
    axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=right.images[1].get_alpha(), interpolation="nearest")
    figure.set_layout_engine("none")
    figure.set_dpi(100)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    expected = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    assert np.abs(np.asarray(drawn).astype(int) - expected).max() <= 3  # Agg rounds twice
    assert np.abs(np.asarray(drawn) / 255 - picture).max() > 0.2


def test_the_map_of_a_grey_model_is_in_colour(cat):
    grey = Classifier(convmixer.create_model(NAME, pretrained=True, in_chans=1, device="cpu"), backends=())
    drawn = np.asarray(grey.classify(cat).activation).astype(int)
    assert drawn.shape == (448, 448, 3)
    assert np.abs(drawn[..., 0] - drawn[..., 2]).max() > 50


def test_a_broken_image(classifier, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(ImageError, match="is not an image that Pillow can read"):
        classifier.classify(tmp_path / "broken.png")


def test_times(classifier, monkeypatch):
    """A clock that moves only while a model computes: 5 ms a call."""
    classifier = Classifier(classifier.model, backends=["eager"])  # its backend has not been built yet
    now = [0.0]
    monkeypatch.setattr("convmixer.runtime.timing.time.perf_counter", lambda: now[0])
    optimized = torch.nn.Identity()
    optimized.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.005))
    built = []
    monkeypatch.setattr(module, "optimize", lambda _, *, backend: built.append(backend) or optimized)
    for _ in range(2):
        (row,) = classifier.time_backends()
        assert (row.backend, row.milliseconds, row.failure) == ("eager", pytest.approx(5), "")
    assert built == ["eager"]  # once


def test_backends_that_work_here_are_timed(classifier):
    found = Classifier(classifier.model).backends
    assert {"eager"} <= set(found) <= {"native", "openvino", "onnxruntime", "eager"}
    assert [row.milliseconds > 0 for row in classifier.time_backends()] == [True]


@pytest.mark.parametrize(
    ("error", "failure"),
    [(DependencyError("openvino is broken"), "openvino is broken"), (OSError("no file"), "OSError: no file")],
)
def test_a_backend_that_fails_stops_no_other(classifier, monkeypatch, error, failure):
    real = module.optimize

    def optimize(model, *, backend):
        if backend == "openvino":
            raise error
        return real(model, backend=backend)

    monkeypatch.setattr(module, "optimize", optimize)
    broken, working = Classifier(classifier.model, backends=["openvino", "eager"]).time_backends()
    assert (broken.milliseconds, broken.failure) == (None, failure)
    assert working.milliseconds > 0


@pytest.mark.parametrize("nothing", [(), {}])
def test_without_a_name_the_packaged_weights(nothing):
    assert list(open_classifiers(nothing, device="cpu", backends=())) == [
        "convmixer_256_8.cifar10",
        "convmixer_128_8_ks7_p2.cifar10",
        "convmixer_256_8_ks9_p1.cifar10",
    ]


def test_runs_and_names_of_the_page(run, photographs):
    by_folder, by_name = (
        open_classifiers(models, device="cpu", backends=()) for models in ([str(run)], {"Flowers": str(run)})
    )
    assert list(by_folder) == [str(run)]
    answer = by_name["Flowers"].classify(photographs / "dog.jpg")
    assert {label for label, _ in answer.predictions} == {"aster", "rose", "tulip"}


def test_a_name_with_a_typo():
    with pytest.raises(
        UnknownModelError,
        match=r"no folder or file 'convmixer_265_8', and no model: unknown model 'convmixer_265_8'; did you mean convm",
    ):
        open_classifiers(["convmixer_265_8"], device="cpu")


def test_models_that_cannot_answer(run):
    with pytest.raises(WeightsError, match="convmixer_512_12 has no weights"):
        open_classifiers(["convmixer_512_12"], device="cpu")
    (run / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no model\.safetensors, which the end of a run writes"):
        open_classifiers([str(run)], device="cpu")
    with pytest.raises(ArgumentError, match="models='convmixer_256_8': give a list of names"):
        open_classifiers("convmixer_256_8")
    with pytest.raises(ArgumentError, match="this model has no classes"):
        Classifier(convmixer.create_model(NAME, num_classes=0, device="cpu"))
    with pytest.raises(ArgumentError, match="takes images with 4 channels: a picture has 3, or 1 if grey"):
        Classifier(convmixer.create_model(NAME, in_chans=4, device="cpu"))


@pytest.mark.parametrize(
    ("backends", "text"),
    [(["egaer"], "unknown backend 'egaer'; valid: auto, eager"), ("eager", "give a list of names")],
)
def test_a_backend_that_does_not_exist(classifier, backends, text):
    with pytest.raises(ArgumentError, match=text):
        Classifier(classifier.model, backends=backends)


def test_a_backend_for_another_device(classifier):
    with pytest.raises(ArgumentError, match="triton"):
        Classifier(classifier.model, backends=["triton"])


@pytest.mark.parametrize("module_name", ["captum.attr", "matplotlib"])
def test_what_is_not_installed(classifier, monkeypatch, module_name):
    monkeypatch.setitem(sys.modules, module_name, None)
    with pytest.raises(DependencyError, match=rf"needs {module_name.partition('.')[0]}, which is missing: pip install"):
        classifier.classify(Image.new("RGB", (32, 32)))
