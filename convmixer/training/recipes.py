"""The recipes, one record each. The command line and Python override their fields; every run saves the result."""

from __future__ import annotations

import dataclasses
from typing import Any

from convmixer.errors import ArgumentError, nearest
from convmixer.training.recipe import Recipe

_CONSTANT: dict[str, Any] = {"warmup": 0.0, "knee": (1.0, 1.0)}

# The settings that reached the most on images held out, with `convmixer_256_8` over 16 epochs; see docs/recipes.md.
_BEST = Recipe(
    epochs=200,
    batch_size=256,
    opt="muon",
    lr=0.01,
    betas=(0.9, 0.999),
    eps=1e-3,
    weight_decay=0.1,
    warmup=0.1,
    knee=(1.0, 0.0),
    label_smoothing=0.1,
    mixup=0.5,
    cutmix=0.5,
    mix_prob=0.5,
    ema_decay=0.999,
    shift=2,
    fill="mean",
    rand_augment=(2, 9),
    random_erasing=0.25,
    validation_fraction=0.0,
)

RECIPES = {
    "cifar10": Recipe(
        note="The settings published with the paper's CIFAR-10 code (92.60 % there).",
    ),
    "cifar10-100": Recipe(
        epochs=100,
        color_jitter=0.2,
        random_erasing=0.2,
        note="The same over 100 epochs with more augmentation (above 94 % with the paper's code).",
    ),
    "cifar10-best": dataclasses.replace(
        _BEST,
        note="For the best accuracy of `convmixer_256_8`, on a GPU: Muon, much weight decay, mixed images and an "
        "average of the weights. It holds no images out and looks at the test images once, at the end; choose settings "
        "with `--set validation_fraction=0.1`. It made the weights that ship.",
    ),
    "cifar10-best-128": dataclasses.replace(
        _BEST,
        model="convmixer_128_8_ks7_p2",
        weight_decay=0.05,
        mixup=0.0,
        cutmix=0.0,
        random_erasing=0.1,
        note="The same for a model of 0.19 million parameters, which has less to spare: half the weight decay, and no "
        "mixed images. It made the weights that ship.",
    ),
    "cifar10-best-p1": dataclasses.replace(
        _BEST,
        model="convmixer_256_8_ks9_p1",
        batch_size=128,
        note="The same for the variant of the paper's table for CIFAR-10, which takes 4.7 times the multiplications. "
        "A script outside this package reached 95.08 % after 48 epochs, with mixed images only until 80 % of the run.",
    ),
    "cifar10-cpu": Recipe(
        epochs=10,
        batch_size=64,
        lr=0.01,
        weight_decay=0.01,
        warmup=0.2,
        knee=(1.0, 0.0),
        label_smoothing=0.1,
        shift=2,
        rand_augment=(0, 0),
        image_sizes=((0.0, 16), (0.2, 20), (0.45, 26), (0.7, 32)),
        note="For a CPU: few epochs, small images first, and augmentation that costs nothing.",
    ),
    "cifar10-cpu-2": Recipe(
        epochs=17,
        batch_size=64,
        lr=0.01,
        weight_decay=0.01,
        warmup=0.1,
        knee=(1.0, 0.0),
        label_smoothing=0.1,
        shift=3,
        rand_augment=(1, 9),
        random_erasing=0.2,
        image_sizes=((0.0, 24), (0.25, 28), (0.5, 32)),
        validation_fraction=0.02,
        note="A further round for what `cifar10-cpu` has trained: give that as `--set checkpoint=`. With more "
        "augmentation and fewer images held out.",
    ),
    "cifar10-fast": dataclasses.replace(
        _BEST,
        epochs=34,
        mixup=0.0,
        cutmix=0.0,
        ema_decay=0.0,
        note="For an hour on two CPU cores with AMX, by native kernels: `cifar10-best` over 34 epochs, without mixed "
        "images and an average of the weights, from which only long runs gain. It holds no images out, either.",
    ),
    "cifar10-p1": Recipe(
        model="convmixer_256_8_ks9_p1",
        epochs=200,
        batch_size=64,
        lr=0.01,
        eps=1e-3,
        weight_decay=0.01,
        mixup=0.5,
        cutmix=0.5,
        clip_grad=1.0,
        crop_scale=0.75,
        rand_augment=(2, 9),
        random_erasing=0.25,
        note="For the variant of the paper's table for CIFAR-10 (96.03 % there), with the paper's settings for "
        "ImageNet as a replication of that table took them over: crops of at least 75 % and a weight decay of 0.01.",
    ),
    "imagenet1k": Recipe(
        model="convmixer_1536_20",
        stream=True,
        epochs=150,
        batch_size=640,
        lr=0.01,
        eps=1e-3,
        weight_decay=2e-5,
        label_smoothing=0.1,
        mixup=0.5,
        cutmix=0.5,
        clip_grad=1.0,
        crop_scale=0.08,
        rand_augment=(0, 0),
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        validation_fraction=0.01,
        note="The paper's settings for ImageNet-1k (81.37 % there, on ten GPUs in mixed precision). "
        "For `convmixer_768_32` it took 300 epochs (80.16 %): add `--set model=convmixer_768_32 --set epochs=300`. "
        "Weight decay, label smoothing and the scale of the crops were the defaults of its code. That drew the "
        "interpolation of crops at random; here it is the model's own.",
    ),
    "flux-post": Recipe(
        model="convmixer_128_8_ks7_p2",
        epochs=200,
        batch_size=128,
        opt="adam",
        lr=3e-4,
        weight_decay=1e-3,
        clip_grad=1.0,
        **_CONSTANT,
        flip=0.0,
        rand_augment=(0, 0),
        note="A post that trains a small ConvMixer in Julia with Flux: no augmentation and a constant "
        "rate (74 % there).",
    ),
    "keras-post": Recipe(
        epochs=50,
        batch_size=64,
        lr=1e-3,
        weight_decay=0.0,
        **_CONSTANT,
        vertical_flip=0.5,
        rand_augment=(0, 0),
        color_jitter=0.1,
        patience=5,
        min_delta=0.01,
        note="A post that trains a ConvMixer in Keras, with early stopping. Its open question is whether dropout "
        "helps: compare with `--set drop_rate=0.15 --set block_drop_rate=0.15`.",
    ),
    "finetune": Recipe(
        model="convmixer_256_8.cifar10",
        epochs=20,
        batch_size=64,
        lr=2e-3,
        weight_decay=0.05,
        layer_decay=0.8,
        frozen=0.1,
        warmup=0.2,
        knee=(1.0, 0.0),
        label_smoothing=0.1,
        rand_augment=(0, 0),
        note="From pretrained weights to other classes: first only the head, then all layers, the earlier ones at "
        "lower rates.",
    ),
}


def get_recipe(name: str, **fields: Any) -> Recipe:
    """Return the recipe of that name, with some fields replaced.

    Raises:
        ArgumentError: No such recipe or field, or a value that makes no sense.

    Example:
        >>> from convmixer.training import get_recipe
        >>> get_recipe("cifar10", epochs=5).epochs
        5
    """
    if name not in RECIPES:
        raise ArgumentError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name].override(**fields)
