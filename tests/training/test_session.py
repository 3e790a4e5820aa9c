"""What a run refuses at its start, and what it leaves of its caller's: random numbers, accelerate, files."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, write_digits

import convmixer
from convmixer.data.memory import load_images
from convmixer.errors import ArgumentError
from convmixer.training import evaluate, get_recipe, train
from convmixer.training.history import Epoch, read_history, write_history

pytestmark = pytest.mark.usefixtures("no_curves")
QUICK = {"epochs": 1, "batch_size": 30, "lr": 0.01, **SMALL_MODEL}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 60, 20, ("zero", "one", "two"))


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("context", "name"),
    [
        (torch.no_grad, "no_grad"),
        (torch.inference_mode, "inference_mode"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_contexts_that_would_reach_into_the_training(digits, tmp_path, context, name):
    """Autocast of the caller keeps weights of the first step, and learns nothing more."""
    recipe = get_recipe("cifar10", **QUICK)
    with context(), pytest.raises(ArgumentError, match=rf"train was called within torch\.{name}, .*: leave it first"):
        train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    assert not (tmp_path / "run").exists()


def test_random_numbers_of_the_caller_go_on(digits, tmp_path):
    drawn = []
    for trained in (False, True):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if trained:
            train(get_recipe("cifar10", **QUICK), digits, tmp_path / "run", device="cpu", report=quiet)
        drawn.append((torch.rand(3).tolist(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[1]


def test_the_accelerator_of_the_caller_goes_on(digits, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    own = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    own.gradient_state._set_sync_gradients(False)  # as in the middle of an accumulation, in which no step is taken
    try:
        result = train(get_recipe("cifar10", **QUICK), digits, tmp_path / "run", device="cpu", report=quiet)
        assert (own.mixed_precision, own.device.type) == ("bf16", "cpu")
        assert not own.sync_gradients
        own.gradient_state._set_sync_gradients(True)
        again = train(get_recipe("cifar10", **QUICK), digits, tmp_path / "again", device="cpu", report=quiet)
        assert torch.equal(result.model.head.weight, again.model.head.weight)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_settings_of_accelerate_in_the_environment(digits, tmp_path, monkeypatch):
    """They would divide every gradient."""
    weights = []
    for name in ("plain", "set"):
        if name == "set":
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        recipe = get_recipe("cifar10", **QUICK | {"opt": "sgd", "lr": 0.05})
        result = train(recipe, digits, tmp_path / name, device="cpu", report=quiet)
        weights.append(result.model.head.weight)
    assert torch.equal(*weights)


def test_another_precision_on_resuming_is_said(digits, tmp_path):
    recipe = get_recipe("cifar10", **QUICK)
    train(recipe, digits, tmp_path / "run", device="cpu", precision="float32", report=quiet)
    said = []
    options = {"device": "cpu", "resume": True, "report": said.append}
    train(recipe.override(epochs=2), digits, tmp_path / "run", precision="bfloat16", **options)
    assert "precision was float32 before the interruption, and is bfloat16 now: the results will differ" in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["precision"] == "bfloat16"
    said.clear()
    train(recipe.override(epochs=3), digits, tmp_path / "run", precision="bfloat16", **options)
    assert not [line for line in said if "before the interruption" in line]


@pytest.mark.parametrize("name", ["best.safetensors", "metrics.csv", "result.json"])
def test_files_of_others_are_not_replaced(digits, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ArgumentError, match=rf"holds a {name} that is not of a run, and the run would replace it"):
        train(get_recipe("cifar10", **QUICK), digits, tmp_path / "run", device="cpu", report=quiet)
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_run_that_is_replaced_is_named(digits, tmp_path):
    recipe = get_recipe("cifar10", **QUICK)
    train(recipe, digits, tmp_path / "run", device="cpu", report=quiet)
    (tmp_path / "run" / "last.pt").unlink()
    said = []
    train(recipe, digits, tmp_path / "run", device="cpu", report=said.append)
    assert f"this run replaces the one in {str(tmp_path / 'run')!r}, which cannot be resumed" in said


def test_patience_with_validation_images_of_their_own(digits, tmp_path):
    recipe = get_recipe("cifar10", **QUICK | {"patience": 1, "validation_fraction": 0.0})
    train(recipe, digits, tmp_path / "run", val=digits / "test", device="cpu", report=quiet)
    with pytest.raises(ArgumentError, match="patience=1 needs validation images"):
        train(recipe, digits, tmp_path / "other", device="cpu", report=quiet)


def test_rates_however_small_are_recorded(tmp_path):
    rates = 1.0417e-08, 5e-7, 0.012345678
    rows = [Epoch(i, lr, 2.0, 25.0, 1.8, 30.0, 60.0, 750.0) for i, lr in enumerate(rates, start=1)]
    write_history(tmp_path / "metrics.csv", rows)
    assert [row.learning_rate for row in read_history(tmp_path / "metrics.csv")] == [1.0417e-08, 5e-07, 0.0123457]


def test_what_is_no_recipe_and_what_does_not_fit(digits, tmp_path):
    with pytest.raises(ArgumentError, match=r"recipe='cifar10': give a Recipe, such as get_recipe\('cifar10'\)"):
        train("cifar10", digits, tmp_path / "run")
    with pytest.raises(ArgumentError, match="workers='2': give at least 0"):
        train(get_recipe("cifar10", **QUICK, stream=True), digits, tmp_path / "run", workers="2")
    model = convmixer.create_model("convmixer_128_8_ks7_p2", device="cpu", dim=8, depth=1, num_classes=2)
    images = load_images(digits, "test", (3, 8, 8), report=quiet)
    with pytest.raises(ArgumentError, match=r"images of \d+ classes for a model of 2"):
        evaluate(model, images)
