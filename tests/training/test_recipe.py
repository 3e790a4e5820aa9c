"""The fields of recipes, and the published ones."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from convmixer.errors import ArgumentError
from convmixer.training import RECIPES, Recipe, get_recipe
from convmixer.training.schedule import image_size, learning_rate


def test_published_recipe():
    recipe = RECIPES["cifar10"]
    assert (recipe.epochs, recipe.batch_size, recipe.opt, recipe.lr, recipe.weight_decay) == (
        25,
        512,
        "adamw",
        0.05,
        0.005,
    )
    assert (recipe.rand_augment, recipe.validation_fraction) == ((2, 12), 0.1)


def test_triangular_schedule():
    recipe = RECIPES["cifar10"]
    at = [learning_rate(recipe, p) for p in (0, 0.2, 0.4, 0.6, 0.8, 0.9, 1)]
    assert at == pytest.approx([0, 0.025, 0.05, 0.02625, 0.0025, 0.00125, 0])
    assert learning_rate(Recipe(warmup=0.0, knee=(1.0, 0.0)), 0) == 0.05


def test_image_sizes_change_at_their_part_of_the_run():
    recipe = Recipe(image_sizes=((0.0, 16), (0.5, 32)))
    assert [image_size(recipe, p) for p in (0, 0.49, 0.5, 1)] == [16, 16, 32, 32]
    assert image_size(Recipe(), 0.5) is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"epoch": 3}, "unknown recipe field 'epoch'; did you mean epochs"),
        ({"epochs": 0}, "recipe field epochs=0: give a whole number of at least 1"),
        ({"lr": -1.0}, "recipe field lr=-1.0"),
        ({"flip": 2}, "recipe field flip=2: give a number in [0, 1]"),
        ({"rand_augment": (2, 31)}, "recipe field rand_augment=(2, 31)"),
        ({"image_sizes": ((0.5, 16),)}, "recipe field image_sizes="),
        (
            {"image_sizes": ((0.0, math.inf),)},
            "image_sizes=((0.0, inf),): give pairs: rising parts of the run",
        ),
        ({"knee": (0.1, 0.5)}, "recipe field knee=(0.1, 0.5)"),
        ({"validation_fraction": 1.0}, "recipe field validation_fraction=1.0"),
        ({"mix_prob": 1.5}, "recipe field mix_prob=1.5: give a number in [0, 1]"),
        ({"mix_until": -0.1}, "recipe field mix_until=-0.1: give a number in [0, 1]"),
        ({"fill": "white"}, 'recipe field fill=\'white\': give "black" or "mean"'),
        ({"trivial_augment": 1}, "recipe field trivial_augment=1: give True or False"),
        (
            {"trivial_augment": True},
            "contradictory recipe: trivial_augment=True takes the place of rand_augment=(2, 12): give "
            "rand_augment=(0, 0), or trivial_augment=False",
        ),
        (
            {"trivial_augment": True, "rand_augment": (0, 0), "stream": True, "auto_augment": "v0"},
            "contradictory recipe: auto_augment='v0' takes the place of trivial_augment=True: leave one of them out",
        ),
        ({"in_chans": 2}, "recipe field in_chans=2: give 3 or 1"),
        ({"in_chans": True}, "recipe field in_chans=True"),
        ({"epochs": True}, "recipe field epochs=True"),
        ({"lr": True}, "recipe field lr=True"),
        ({"lr": "0.1"}, "recipe field lr='0.1': give a finite number above 0"),
        ({"lr": None}, "recipe field lr=None: give a finite number above 0"),
        ({"flip": (0.5,)}, "recipe field flip=(0.5,): give a number in [0, 1]"),
        ({"weight_decay": math.inf}, "recipe field weight_decay=inf: give a finite number of at least 0"),
        ({"mixup": math.nan}, "recipe field mixup=nan: give a finite number of at least 0"),
        ({"shift": 1.5}, "recipe field shift=1.5: give a whole number of at least 0"),
        ({"image_sizes": ((0, 16), (50, 32))}, "rising parts of the run, from 0 on and below 1"),
        ({"image_sizes": ((0, 16), (float("nan"), 32))}, "rising parts of the run, from 0 on and below 1"),
        ({"model_args": (("dim", 8), ("dim", 16))}, "each name once"),
        ({"opt": "adahessian"}, "recipe field opt='adahessian': give a first-order optimizer"),
        ({"seed": 2**63}, f"recipe field seed={2**63}: give a whole number from 0 to 2**63 - 1"),
        ({"in_chans": 3.0}, "recipe field in_chans=3.0: give 3 or 1"),
        ({"opt": None}, "recipe field opt=None: give a first-order optimizer of timm"),
        ({"model": None}, "recipe field model=None: give a string"),
        ({"checkpoint": Path("best.safetensors")}, "Path('best.safetensors'): give a string"),
        (
            {"model_args": (("width", 8),)},
            "recipe field model_args=(('width', 8),): give pairs of one of dim, depth, kernel_size, patch_size and a "
            "whole number of at least 1",
        ),
        ({"model_args": (("depth", 0),)}, "recipe field model_args=(('depth', 0),): give pairs"),
        ({"rand_augment": (2,)}, "recipe field rand_augment=(2,): give two whole numbers"),
        ({"knee": 0.8}, "recipe field knee=0.8: give two numbers"),
        ({"betas": (0.9,)}, "recipe field betas=(0.9,): give 2 numbers in [0, 1), or none"),
        ({"opt": "sgd", "betas": (0.9, 0.9)}, "recipe field betas=(0.9, 0.9): give none: 'sgd' has no betas"),
        ({"input_size": (8,)}, "recipe field input_size=(8,): give height and width"),
        ({"layer_decay": 0.0}, "recipe field layer_decay=0.0: give a number in (0, 1]"),
        ({"frozen": 0.5}, "contradictory recipe: frozen=0.5 keeps a backbone that was never trained"),
        ({"accumulate": 3}, "contradictory recipe: batch_size=512 does not divide into accumulate=3 parts"),
        ({"mixup": 0.1, "batch_size": 9}, "contradictory recipe: mixup and cutmix pair images: batch_size=9"),
        ({"class_weights": "even"}, "recipe field class_weights='even': give \"balanced\", or a number above 0"),
        ({"class_weights": (1.0, -1.0)}, "recipe field class_weights=(1.0, -1.0): give"),
        ({"class_weights": (0, 1)}, "recipe field class_weights=(0, 1): give"),
        ({"balanced": 1}, "recipe field balanced=1: give True or False"),
        ({"balanced": True, "class_weights": "balanced"}, "both make up for rare classes: give one of them"),
    ],
)
def test_senseless_recipes(fields, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        get_recipe("cifar10", **fields)


def test_unknown_recipe():
    with pytest.raises(ArgumentError, match="unknown recipe 'cifar'; did you mean cifar10"):
        get_recipe("cifar")


def test_best_recipes_hold_out_no_images_and_differ_in_little():
    best, small, fine = (RECIPES[f"cifar10-best{name}"] for name in ("", "-128", "-p1"))
    assert {recipe.validation_fraction for recipe in (best, small, fine)} == {0.0}
    assert (best.opt, best.lr, best.weight_decay, best.batch_size, best.epochs) == ("muon", 0.01, 0.1, 256, 200)
    assert (best.mixup, best.cutmix, best.mix_prob, best.mix_until) == (0.5, 0.5, 0.5, 1.0)
    assert (small.weight_decay, small.random_erasing, small.mixup, small.cutmix) == (0.05, 0.1, 0.0, 0.0)
    assert (fine.batch_size, fine.epochs) == (128, 200)
    # A rise over a tenth of the run, then a line to 0.
    assert [learning_rate(best, p) for p in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.005, 0.01, 0.005, 0.0])


def test_lists_of_json_and_numbers_of_numpy():
    """A run's recipe.json makes the same recipe."""
    recipe = Recipe(input_size=(8, 8), image_sizes=((0, 8), (0.5, 16)), model_args=(("dim", 8),), rand_augment=(1, 9))
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    assert Recipe(batch_size=np.int64(10), lr=np.float32(0.5)) == Recipe(batch_size=10, lr=0.5)
    assert type(Recipe(batch_size=np.int64(10)).batch_size) is int
