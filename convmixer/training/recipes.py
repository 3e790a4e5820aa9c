"""One record per recipe. The command line and Python override its fields; every run saves the result."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from convmixer.data.stream import policy
from convmixer.errors import ArgumentError, nearest

LOOKAHEAD = "lookahead_"  # in front of the name of any optimizer of timm


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, beside the data.

    Attributes:
        model: Variant to train, or `variant.tag` to start from those weights.
        checkpoint: A .safetensors file to start from, in place of the weights that `model` names.
        stream: Decode images when a step needs them, in worker processes, for sets that do not fit into memory.
        in_chans: Channels of the images, 3 or 1.
        input_size: (height, width) of the images that the model takes; empty: the model's own.
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes; the last, smaller batch of an epoch is left out.
        accumulate: Parts in which each process computes its share of a step, to save memory. BatchNorm sees one part
            at a time.
        sync_batchnorm: BatchNorm sees the images of all processes; on GPUs, or with fused blocks.
        opt: An optimizer of timm by name: "adamw", "sgd", "lamb", ... "muon" is timm's Muon, with Nesterov momentum of
            0.95 and its updates scaled to those of Adam, for the 1x1 weights of blocks, and AdamW for everything else.
        lr: Peak learning rate.
        betas: Decay of the averages that Adam and its kin keep of gradients and of their squares; empty: the
            optimizer's own.
        eps: Term in the denominator of Adam and its kin.
        weight_decay: On weights of two or more dimensions.
        layer_decay: Factor on the rate from each block to the one before it; 1 gives all layers the same.
        frozen: Part of the run, from its start, in which the head alone learns and the backbone stays as it is,
            BatchNorm included; 1 never trains the backbone.
        warmup: Part of the run in which the rate rises from 0 to `lr`, linearly.
        knee: (part of the run, part of `lr`) through which the rate falls, linearly; it ends at 0.
        label_smoothing: In [0, 1).
        mixup: Alpha of mixup; 0 leaves it out. Each mixed image has a share of its own, and with cutmix one or the
            other, both as likely.
        cutmix: Alpha of cutmix; 0 leaves it out. Each mixed image has a rectangle of its own.
        mix_prob: Probability that an image is mixed, where there is mixup or cutmix.
        mix_until: Part of the run after which no images are mixed.
        clip_grad: Largest gradient norm; 0 does not clip.
        ema_decay: Of the average of the weights that is validated and kept, after t steps at most (1 + t) / (10 + t); 0
            keeps the weights themselves.
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip.
        shift: Largest translation in pixels, in each direction, borders reflected.
        crop_scale: Smallest part of the area that a random crop keeps before it is resized; 1 does not crop.
        rand_augment: (operations, magnitude of 0 to 30) of RandAugment, drawn for each image; 0 operations leave it
            out.
        trivial_augment: TrivialAugmentWide, one operation of random magnitude for each image, in place of
            `rand_augment`.
        fill: What the two of them put where a shear, a translation or a rotation leaves nothing: "black", or "mean",
            the mean colour of the model's preprocessing.
        auto_augment: A policy of timm such as "rand-m9-mstd0.5-inc1" or "v0", in place of both; needs `stream`. Empty
            leaves it out.
        color_jitter: Strength of brightness, contrast, saturation and hue changes.
        random_erasing: Probability that a rectangle, of 2 to 33 % of the area, is replaced by noise.
        image_sizes: (part of the run, pixels): from there on the shorter side of images is that. Empty: always the
            model's own size. Small images first cost less and cost little accuracy.
        drop_rate: Dropout before the head.
        block_drop_rate: Dropout before every block.
        drop_path_rate: Stochastic depth.
        patience: Epochs without a better validation loss after which training stops and the best weights are
            restored; 0 trains to the end.
        min_delta: How much lower the validation loss must be to count as better.
        validation_fraction: Part of the training images held out for validation, chosen by `seed`. Data with validation
            images of their own keep all training images.
        class_weights: What the loss of each class is multiplied by, in the order of the classes, or "balanced" for the
            inverse of its number of images. Validation is not weighted.
        balanced: Draw training images with replacement so that all classes are as frequent.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        seed: Of the split, the initialisation, the order and the augmentation.
        note: What the recipe is for; it decides nothing.
    """

    model: str = "convmixer_256_8"
    checkpoint: str = ""
    stream: bool = False
    in_chans: int = 3
    input_size: tuple[int, ...] = ()
    epochs: int = 25
    batch_size: int = 512
    accumulate: int = 1
    sync_batchnorm: bool = False
    opt: str = "adamw"
    lr: float = 0.05
    betas: tuple[float, ...] = ()
    eps: float = 1e-8
    weight_decay: float = 0.005
    layer_decay: float = 1.0
    frozen: float = 0.0
    warmup: float = 0.4
    knee: tuple[float, float] = (0.8, 0.05)
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_until: float = 1.0
    clip_grad: float = 0.0
    ema_decay: float = 0.0
    flip: float = 0.5
    vertical_flip: float = 0.0
    shift: int = 0
    crop_scale: float = 1.0
    rand_augment: tuple[int, int] = (2, 12)
    trivial_augment: bool = False
    fill: str = "black"
    auto_augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    image_sizes: tuple[tuple[float, int], ...] = ()
    drop_rate: float = 0.0
    block_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    patience: int = 0
    min_delta: float = 0.0
    validation_fraction: float = 0.1
    class_weights: str | tuple[float, ...] = ""
    balanced: bool = False
    draft: bool = True
    seed: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("knee", "rand_augment", *(["image_sizes"] if self.image_sizes else [])):
            value = getattr(self, name)
            rows = value if name == "image_sizes" else (value,)
            fine = isinstance(rows, tuple) and all(
                isinstance(row, tuple) and len(row) == 2 and all(isinstance(n, int | float) for n in row)
                for row in rows
            )
            self._check(name, fine, "pairs of numbers" if name == "image_sizes" else "two numbers")
        for name in ("stream", "sync_batchnorm", "trivial_augment", "balanced", "draft"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check("fill", self.fill in ("black", "mean"), '"black" or "mean"')
        self._check("auto_augment", _is_policy(self.auto_augment), 'a policy of timm such as "rand-m9-mstd0.5-inc1"')
        weights = self.class_weights
        fine = weights in ("", "balanced") or (
            isinstance(weights, tuple) and all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights)
        )
        fine = fine and (isinstance(weights, str) or any(weights))
        self._check("class_weights", fine, '"balanced", or a number of at least 0 for each class, not all of them 0')
        known = self.opt.removeprefix(LOOKAHEAD) in list_optimizers()
        self._check("opt", known, "an optimizer of timm.optim.list_optimizers()")
        count = _count_betas(self.opt)
        fine = isinstance(self.betas, tuple) and all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas)
        valid = f"{count} numbers in [0, 1), or none" if count else f"none: {self.opt!r} has no betas"
        self._check("betas", fine and len(self.betas) in (0, count), valid)
        for name in ("epochs", "batch_size", "accumulate"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "at least 1")
        self._check("in_chans", self.in_chans in (1, 3), "3 or 1")
        fine = isinstance(self.input_size, tuple) and all(isinstance(n, int) and n > 0 for n in self.input_size)
        self._check("input_size", fine and len(self.input_size) in (0, 2), "height and width in pixels")
        for name in ("seed", "patience"):
            fine = isinstance(getattr(self, name), int) and getattr(self, name) >= 0
            self._check(name, fine, "a whole number of at least 0")
        for name in ("lr", "eps"):
            self._check(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("weight_decay", "clip_grad", "shift", "color_jitter", "mixup", "cutmix", "min_delta"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("flip", "vertical_flip", "random_erasing", "frozen", "mix_prob", "mix_until"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("layer_decay", "crop_scale"):
            self._check(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        rates = ("drop_rate", "block_drop_rate", "drop_path_rate")
        for name in ("label_smoothing", "warmup", "validation_fraction", "ema_decay", *rates):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("knee", self.warmup < self.knee[0] <= 1 and 0 <= self.knee[1] <= 1, "(after warmup .. 1, 0 .. 1)")
        operations, magnitude = self.rand_augment
        fine = isinstance(operations, int) and isinstance(magnitude, int) and operations >= 0 and 0 <= magnitude <= 30
        self._check("rand_augment", fine, "two whole numbers (operations >= 0, magnitude 0 to 30)")
        starts = [start for start, _ in self.image_sizes]
        fine = starts == sorted(set(starts)) and all(size >= 1 for _, size in self.image_sizes)
        self._check("image_sizes", fine and starts[:1] in ([], [0.0]), "rising parts of the run from 0, sides above 0")
        self._check_together()

    def _check_together(self) -> None:
        """Settings that are fine by themselves but contradict each other."""
        conflicts = {
            "patience needs validation images: give validation_fraction above 0": self.patience
            and not self.validation_fraction,
            f"frozen={self.frozen} keeps a backbone that was never trained: give model=VARIANT.TAG, or a "
            "checkpoint": self.frozen and "." not in self.model and not self.checkpoint,
            f"auto_augment={self.auto_augment!r} changes images one by one: give stream=True": self.auto_augment
            and not self.stream,
            f"auto_augment={self.auto_augment!r} takes the place of rand_augment={self.rand_augment}: give "
            "rand_augment=(0, 0), or no auto_augment": self.auto_augment and self.rand_augment[0],
            f"trivial_augment=True takes the place of rand_augment={self.rand_augment}: give rand_augment=(0, 0), or "
            "trivial_augment=False": self.trivial_augment and self.rand_augment[0],
            f"auto_augment={self.auto_augment!r} takes the place of trivial_augment=True: leave one of them "
            "out": self.auto_augment and self.trivial_augment,
            'balanced=True and class_weights="balanced" both make up for rare classes: give one of them': self.balanced
            and self.class_weights == "balanced",
            f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} parts": self.batch_size
            % self.accumulate,
            f"mixup and cutmix pair images: batch_size={self.batch_size} over accumulate={self.accumulate} is odd": (
                self.mixup or self.cutmix
            )
            and (self.batch_size // self.accumulate) % 2,
        }
        for message, conflict in conflicts.items():
            if conflict:
                raise ArgumentError(f"contradictory recipe: {message}")

    def _check(self, name: str, fine: bool, valid: str) -> None:
        if not fine:
            raise ArgumentError(f"recipe field {name}={getattr(self, name)!r}: give {valid}")

    def override(self, **fields: Any) -> Recipe:
        """A copy with other values; an unknown field is an error."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in fields:
            if name not in names:
                raise ArgumentError(f"unknown recipe field {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **fields)

    def learning_rate(self, progress: float) -> float:
        """The rate after a part `progress` in [0, 1] of the run."""
        corners = [(0.0, 0.0 if self.warmup else 1.0), (self.warmup, 1.0), self.knee, (1.0, 0.0)]
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            if progress <= x1 and x1 > x0:
                return self.lr * (y0 + (y1 - y0) * (progress - x0) / (x1 - x0))
        return 0.0

    def image_size(self, progress: float) -> int | None:
        """The side of training images after a part `progress` of the run; None is the model's own."""
        reached = [size for start, size in self.image_sizes if progress >= start]
        return reached[-1] if reached else None


def _count_betas(opt: str) -> int:
    """The number of betas of an optimizer of timm."""
    info = get_optimizer_info(opt.removeprefix(LOOKAHEAD))
    if not info.has_betas:
        return 0
    if isinstance(info.opt_class, str):  # of a package that may be missing
        return int(info.num_betas)
    return len(inspect.signature(info.opt_class).parameters["betas"].default or ())


def _is_policy(name: Any) -> bool:
    try:
        return name == "" or policy(name, (32, 32), (0.5,)) is not None
    except Exception:  # timm asserts, and converts parts of the name
        return False


_CONSTANT: dict[str, Any] = {"warmup": 0.0, "knee": (1.0, 1.0)}
# The paper's settings for ImageNet, as a replication of its CIFAR-10 table took them over.
_STRONG = Recipe(
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
)

# What reached the most on images held out, with `convmixer_256_8` over 16 epochs; see docs/training.md.
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
    mix_until=0.8,
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
        "with `--set validation_fraction=0.1`. A script outside this package with the same settings reached 95.07 % "
        "after 150 epochs (one NVIDIA H200, seed 0).",
    ),
    "cifar10-best-128": dataclasses.replace(
        _BEST,
        model="convmixer_128_8_ks7_p2",
        weight_decay=0.05,
        mixup=0.0,
        cutmix=0.0,
        random_erasing=0.1,
        note="The same for a model of 0.19 million parameters, which has less to spare: half the weight decay, and no "
        "mixed images. 96 of its 200 epochs made the weights that ship: 93.83 % (`--set epochs=96`, 128 s of steps on "
        "an NVIDIA H200, seed 0).",
    ),
    "cifar10-best-p1": dataclasses.replace(
        _BEST,
        model="convmixer_256_8_ks9_p1",
        batch_size=128,
        note="The same for the variant of the paper's table for CIFAR-10, which takes 4.7 times the multiplications. "
        "The script reached 95.08 % after 48 epochs.",
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
    "cifar10-p1": dataclasses.replace(
        _STRONG,
        model="convmixer_256_8_ks9_p1",
        note="For the variant of the paper's table for CIFAR-10 (96.03 % there), with the paper's settings for "
        "ImageNet, crops of at least 75 % and a weight decay of 0.01.",
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
        note="From pretrained weights to other classes: first the head alone, then all layers, the earlier ones at "
        "lower rates.",
    ),
}


def get_recipe(name: str, **fields: Any) -> Recipe:
    """The recipe of that name, with some fields replaced.

    Raises:
        ArgumentError: No such recipe or field, or a value that makes no sense.
    """
    if name not in RECIPES:
        raise ArgumentError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name].override(**fields)
