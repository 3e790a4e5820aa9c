"""What decides the outcome of a training run, and which values make sense."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from convmixer.data.stream import policy
from convmixer.errors import ArgumentError, is_count, nearest
from convmixer.model import plain
from convmixer.registry import SHAPE

LOOKAHEAD = "lookahead_"  # a prefix of the name of any optimizer of timm


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, other than the data.

    Attributes:
        model: Variant to train, or `variant.tag`, `hf-hub:owner/repo` or `local-dir:PATH` to start from those weights.
        checkpoint: A .safetensors file to start from, instead of the weights that `model` names.
        model_args: Sizes other than those of `model`: pairs of "dim", "depth", "kernel_size" or "patch_size" and a
            number. Such a model is opened by the folder of its run.
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
        weight_decay: Weight decay, on weights of two or more dimensions.
        layer_decay: Factor on the rate from each block to the one before it; 1 gives all layers the same.
        frozen: Part of the run, from its start, in which only the head learns and the backbone stays as it is,
            BatchNorm included; 1 never trains the backbone.
        warmup: Part of the run in which the rate rises from 0 to `lr`, linearly.
        knee: (part of the run, part of `lr`) through which the rate falls, linearly; it ends at 0.
        label_smoothing: Part of the target, in [0, 1), that is shared by all classes.
        mixup: Alpha of mixup; 0 leaves it out. Each mixed image has its own weight. With cutmix, each image gets one or
            the other, and both are equally likely.
        cutmix: Alpha of cutmix; 0 leaves it out. Each mixed image has its own rectangle.
        mix_prob: Probability that an image is mixed, with mixup or cutmix.
        mix_until: Part of the run after which no images are mixed.
        teacher: A trained model whose answers are learnt besides the labels: a name of `create_model`, the folder of a
            run, or a name of timm; see `convmixer.training.distillation`. Empty: there is none.
        distillation: Part of the loss, in (0, 1], that is the distance from the teacher.
        temperature: What both models' logits are divided by in that distance.
        clip_grad: Largest gradient norm; 0 does not clip.
        ema_decay: Decay of the average of the weights, which is validated and saved; after t steps it is at most
            (1 + t) / (10 + t). 0 validates and saves the weights themselves.
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip.
        shift: Largest translation in pixels, in each direction, borders reflected.
        crop_scale: Smallest part of the area that a random crop keeps before it is resized; 1 does not crop.
        rand_augment: (operations, magnitude of 0 to 30) of RandAugment, drawn for each image; 0 operations leave it
            out.
        trivial_augment: TrivialAugmentWide, one operation of random magnitude for each image, instead of
            `rand_augment`.
        fill: What these two fill the gaps of a shear, a translation or a rotation with: "black", or "mean", the mean
            colour of the model's preprocessing.
        auto_augment: A policy of timm such as "rand-m9-mstd0.5-inc1" or "v0", instead of both; needs `stream`. Empty
            leaves it out.
        color_jitter: Strength of brightness, contrast, saturation and hue changes.
        random_erasing: Probability that a rectangle, of 2 to 33 % of the area, is replaced by noise.
        image_sizes: (part of the run, pixels): from then on the shorter side of images has that many pixels. Empty:
            always the model's own size. Small images at first take less time and cost little accuracy.
        drop_rate: Dropout before the head.
        block_drop_rate: Dropout before every block.
        drop_path_rate: Stochastic depth.
        patience: Epochs without a better validation loss after which training stops and the best weights are
            restored; 0 trains to the end.
        min_delta: How much lower the validation loss must be to count as better.
        validation_fraction: Part of the training images held out for validation, chosen by `seed`. All training
            images of data that have validation images are trained on.
        class_weights: What the loss of each class is multiplied by, in the order of the classes, or "balanced" for the
            inverse of its number of images. Validation is not weighted.
        balanced: Draw training images with replacement so that all classes are equally frequent.
        draft: Decode large JPEG photographs at a reduced scale; see `predict`.
        seed: Seed of the split, the initialization, the order and the augmentation.
        note: What the recipe is for; it decides nothing.

    Example:
        >>> from convmixer.training import Recipe
        >>> Recipe(model="convmixer_128_8_ks7_p2", epochs=10).batch_size
        512
    """

    model: str = "convmixer_256_8"
    checkpoint: str = ""
    model_args: tuple[tuple[str, int], ...] = ()
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
    teacher: str = ""
    distillation: float = 0.5
    temperature: float = 2.0
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
        for field in dataclasses.fields(self):  # lists, as JSON has them, and numbers of NumPy
            object.__setattr__(self, field.name, _as_tuple(plain(getattr(self, field.name))))
        for names, holds, valid in _RULES:
            for name in names.split():
                self._check(name, holds(getattr(self, name)), valid)
        self._check("knee", self.warmup < self.knee[0] <= 1 and 0 <= self.knee[1] <= 1, "(after warmup .. 1, 0 .. 1)")
        count = _count_betas(self.opt)
        valid = f"{count} numbers in [0, 1), or none" if count else f"none: {self.opt!r} has no betas"
        self._check("betas", _are(self.betas, lambda b: _is_number(b) and 0 <= b < 1, 0, count), valid)
        self._check_conflicts()

    def _check(self, name: str, holds: bool, valid: str) -> None:
        if not holds:
            raise ArgumentError(f"recipe field {name}={getattr(self, name)!r}: give {valid}")

    def _check_conflicts(self) -> None:
        """Raise an ArgumentError if settings contradict each other that are fine by themselves."""
        policy, augment = f"auto_augment={self.auto_augment!r}", f"rand_augment={self.rand_augment}"
        conflicts: tuple[tuple[object, str], ...] = (
            (
                self.frozen and not self.pretrained and not self.checkpoint,
                f"frozen={self.frozen} keeps a backbone that was never trained: give model=VARIANT.TAG, or a "
                "checkpoint",
            ),
            (self.auto_augment and not self.stream, f"{policy} changes images one by one: give stream=True"),
            (
                self.auto_augment and self.rand_augment[0],
                f"{policy} takes the place of {augment}: give rand_augment=(0, 0), or no auto_augment",
            ),
            (
                self.trivial_augment and self.rand_augment[0],
                f"trivial_augment=True takes the place of {augment}: give rand_augment=(0, 0), or "
                "trivial_augment=False",
            ),
            (
                self.auto_augment and self.trivial_augment,
                f"{policy} takes the place of trivial_augment=True: leave one of them out",
            ),
            (
                self.balanced and self.class_weights == "balanced",
                'balanced=True and class_weights="balanced" both make up for rare classes: give one of them',
            ),
            (
                self.batch_size % self.accumulate,
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} parts",
            ),
            (
                (self.mixup or self.cutmix) and (self.batch_size // self.accumulate) % 2,
                f"mixup and cutmix pair images: batch_size={self.batch_size} over accumulate={self.accumulate} is odd",
            ),
        )
        for conflict, message in conflicts:
            if conflict:
                raise ArgumentError(f"contradictory recipe: {message}")

    @property
    def pretrained(self) -> bool:
        """Whether `model` names weights: by a tag, or as a folder or a repository."""
        return "." in self.model or ":" in self.model

    @property
    def sizes(self) -> dict[str, Any]:
        """`model_args` as keyword arguments of `create_model`."""
        return dict(self.model_args)

    def override(self, **fields: Any) -> Recipe:
        """Return a copy with other values.

        Raises:
            ArgumentError: An unknown field, or a value that makes no sense.

        Example:
            >>> from convmixer.training import Recipe
            >>> Recipe().override(epochs=5, lr=0.01).epochs
            5
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in fields:
            if name not in names:
                raise ArgumentError(f"unknown recipe field {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **fields)


# ---- what the fields may be -----------------------------------------------------------------------------------------


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_least(value: Any, least: float) -> bool:
    """Return whether `value` is a finite number of at least `least`."""
    return _is_number(value) and least <= value < math.inf


def _is_part(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    return is_count(value, least) and value <= most


def _are(value: Any, holds: Callable[[Any], bool], *counts: int) -> bool:
    """Return whether `value` is a tuple of items for all of which this holds, as many as one of `counts` says."""
    return isinstance(value, tuple) and (not counts or len(value) in counts) and all(map(holds, value))


def _are_image_sizes(value: Any) -> bool:
    if not _are(value, lambda row: _are(row, _is_number, 2)):
        return False
    starts = [start for start, _ in value]
    rising = starts == sorted(set(starts)) and all(0 <= start < 1 for start in starts)
    return starts[:1] in ([], [0]) and rising and all(_is_whole(side, 1) for _, side in value)


def _are_model_args(value: Any) -> bool:
    def is_pair(row: Any) -> bool:
        return isinstance(row, tuple) and len(row) == 2 and row[0] in SHAPE and _is_whole(row[1], 1)

    return _are(value, is_pair) and len(dict(value)) == len(value)


def _are_class_weights(value: Any) -> bool:
    return value in ("", "balanced") or (bool(value) and _are(value, lambda w: _is_number(w) and 0 < w < math.inf))


def _is_policy(value: Any) -> bool:
    try:
        return value == "" or policy(value, (32, 32), (0.5,)) is not None
    except Exception:  # timm asserts, and converts parts of the name
        return False


def _is_optimizer(value: Any) -> bool:
    name = value.removeprefix(LOOKAHEAD) if isinstance(value, str) else ""
    return name in list_optimizers() and not get_optimizer_info(name).second_order


def _count_betas(opt: str) -> int:
    """Return the number of betas of an optimizer of timm."""
    info = get_optimizer_info(opt.removeprefix(LOOKAHEAD))
    if not info.has_betas:
        return 0
    if isinstance(info.opt_class, str):  # of a package that may be missing
        return int(info.num_betas)
    return len(inspect.signature(info.opt_class).parameters["betas"].default or ())


# Fields, what must hold for their values, and what an error says to give.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("stream sync_batchnorm trivial_augment balanced draft", lambda v: isinstance(v, bool), "True or False"),
    ("model checkpoint note", lambda v: isinstance(v, str), "a string"),
    ("epochs batch_size accumulate", lambda v: _is_whole(v, 1), "a whole number of at least 1"),
    ("patience shift", lambda v: _is_whole(v, 0), "a whole number of at least 0"),
    ("seed", lambda v: _is_whole(v, 0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"),
    ("lr eps temperature", lambda v: _is_least(v, 0) and v > 0, "a finite number above 0"),
    (
        "weight_decay clip_grad color_jitter mixup cutmix min_delta",
        lambda v: _is_least(v, 0),
        "a finite number of at least 0",
    ),
    ("flip vertical_flip random_erasing frozen mix_prob mix_until", _is_part, "a number in [0, 1]"),
    ("layer_decay crop_scale distillation", lambda v: _is_part(v) and v > 0, "a number in (0, 1]"),
    ("label_smoothing warmup validation_fraction ema_decay", lambda v: _is_part(v) and v < 1, "a number in [0, 1)"),
    ("drop_rate block_drop_rate drop_path_rate", lambda v: _is_part(v) and v < 1, "a number in [0, 1)"),
    ("in_chans", lambda v: _is_whole(v, 1) and v in (1, 3), "3 or 1"),
    ("input_size", lambda v: _are(v, lambda n: _is_whole(n, 1), 0, 2), "height and width in pixels"),
    (
        "model_args",
        _are_model_args,
        f"pairs of one of {', '.join(SHAPE)} and a whole number of at least 1, each name once",
    ),
    ("opt", _is_optimizer, "a first-order optimizer of timm.optim.list_optimizers()"),
    ("knee", lambda v: _are(v, _is_number, 2), "two numbers"),
    (
        "rand_augment",
        lambda v: _are(v, lambda n: _is_whole(n, 0), 2) and v[1] <= 30,
        "two whole numbers (operations >= 0, magnitude 0 to 30)",
    ),
    (
        "image_sizes",
        _are_image_sizes,
        "pairs: rising parts of the run, from 0 on and below 1, and sides in whole pixels",
    ),
    ("teacher", lambda v: isinstance(v, str), "the name of a model, or the folder of a run"),
    ("fill", lambda v: v in ("black", "mean"), '"black" or "mean"'),
    ("auto_augment", _is_policy, 'a policy of timm such as "rand-m9-mstd0.5-inc1"'),
    (
        "class_weights",
        _are_class_weights,
        '"balanced", or a number above 0 for each class',
    ),
)
