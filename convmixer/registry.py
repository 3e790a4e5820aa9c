"""Every variant and every set of weights, as one literal table. Standard library only.

Sources of shapes and figures: the paper and its repositories (github.com/locuslab/convmixer and convmixer-cifar10, both
MIT), timm's model cards and results tables, and for our own weights the run kept in `docs/runs/`. A figure that nobody
has published in a form that can be checked is not in the table.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convmixer.errors import ArgumentError, UnknownModelError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WEIGHTS_FOLDER = Path(__file__).parent / "weights"
HUB_FILE = "model.safetensors"  # what the Hub's repositories call their weights


@dataclass(frozen=True)
class Metric:
    """One measured figure, in percent, on a named test set, and who measured it."""

    name: str
    value: float
    dataset: str
    measured_by: str


@dataclass(frozen=True)
class Weights:
    """One set of trained weights of a variant.

    Attributes:
        tag: Second half of the full name, `variant.tag`.
        file: Name of the safetensors file in the package; for weights that never shipped, in the Hub repository.
        hub_id: Hub repository that has the file as `model.safetensors`; empty if there is none.
        revision: Branch, tag or commit of that repository.
        licence: SPDX identifier.
        sha256: Of the file, where it was at hand; else empty.
        size: Of the file in bytes, where it was at hand; else 0.
        labels: Label set: "cifar10", or "imagenet-1k" for the thousand of timm's ImageNetInfo.
        metrics: Measured figures.
        training_data: What the weights were trained on.
        recipe: How.
        machine: What they were trained on; empty if it is not known.
        training_seconds: Wall time of the training on that machine; 0 if it is not known.
        seed: Of the training; None if it is not known.
    """

    tag: str
    file: str
    licence: str
    labels: str
    metrics: tuple[Metric, ...]
    training_data: str
    recipe: str
    hub_id: str = ""
    revision: str = "main"
    sha256: str = ""
    size: int = 0
    machine: str = ""
    training_seconds: float = 0
    seed: int | None = None

    @property
    def source(self) -> str:
        """Say where the weights come from: "package", or the file on the Hub where the package does not have it."""
        return f"hf-hub:{self.hub_id}/{HUB_FILE}@{self.revision}" if self.hub_id and not self.path else "package"

    @property
    def path(self) -> Path | None:
        """The file inside the package, or None if this installation does not have it."""
        path = WEIGHTS_FOLDER / self.file
        return path if path.is_file() else None

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Class names by index; None for ImageNet-1k, whose thousand names timm carries."""
        return CIFAR10_CLASSES if self.labels == "cifar10" else None


SHAPE = ("dim", "depth", "kernel_size", "patch_size")  # what the shapes of weights tell of a variant
UNNAMED = {"label_names": None, "label_descriptions": None}  # in a pretrained_cfg whose classes have no names
PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")  # by timm's names
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Variant:
    """One named architecture with its preprocessing; the first of `weights` is the default.

    `crop_mode` is "center", or "squash" where photographs are resized as a whole: at 32 pixels a crop would cut off too
    much of what they show.
    """

    name: str
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act_layer: str = "gelu"
    num_classes: int = 1000
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.96
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    weights: tuple[Weights, ...] = ()
    note: str = ""

    @property
    def architecture(self) -> dict[str, int | str]:
        """The constructor's arguments that define the variant."""
        shape: dict[str, int | str] = {"dim": self.dim, "depth": self.depth, "kernel_size": self.kernel_size}
        return {**shape, "patch_size": self.patch_size, "act_layer": self.act_layer}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared, by the names of timm's pretrained_cfg."""
        return {name: getattr(self, name) for name in PREPROCESSING}

    @property
    def parameters(self) -> int:
        """Number of parameters: every convolution has a bias, every BatchNorm a scale and a shift."""
        h, k, p, n = self.dim, self.kernel_size, self.patch_size, self.num_classes
        stem = self.input_size[0] * h * p * p + h + 2 * h
        block = h * k * k + h + 2 * h + h * h + h + 2 * h
        return stem + self.depth * block + h * n + n

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass at `input_size`, depthwise convolutions counted."""
        h, k, p = self.dim, self.kernel_size, self.patch_size
        channels, height, width = self.input_size
        pixels = (height // p) * (width // p)
        return pixels * (channels * p * p * h + self.depth * (h * k * k + h * h)) + h * self.num_classes

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it, with what follows from the fields."""
        record = asdict(self) | {"parameters": self.parameters, "macs": self.macs}
        for entry, weights in zip(record["weights"], self.weights, strict=True):
            entry["source"] = weights.source
        return record


def _imagenet(name: str, top1: float, real: float, v2: float, recipe: str) -> tuple[Weights, ...]:
    results = "timm's published results table"
    return (
        Weights(
            tag="in1k",
            file=HUB_FILE,
            licence="MIT",
            labels="imagenet-1k",
            metrics=(
                Metric("top-1", top1, "ImageNet-1k validation", "the authors, locuslab/convmixer"),
                Metric("top-1", real, "ImageNet ReaL", results),
                Metric("top-1", v2, "ImageNet-V2", results),
            ),
            training_data="ImageNet-1k",
            recipe=recipe,
            hub_id=f"timm/{name}.in1k",
        ),
    )


_CIFAR10_IMAGES: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": CIFAR10_MEAN,
    "std": CIFAR10_STD,
}
_CARD = "one NVIDIA H200"


def _cifar10(
    name: str,
    recipe: str,
    seconds: float,
    sha256: str,
    size: int,
    figures: str,
    machine: str = _CARD,
    hub_id: str = "",
    revision: str = "main",
) -> tuple[Weights, ...]:
    """`figures`: top-1, top-5 and calibration error in float32, top-1 in bfloat16 and in int8."""
    names = ("top-1", "top-5", "calibration error", "top-1 in bfloat16", "top-1 in int8")
    measured_by = "the convmixer developers, native backend on an Intel Xeon with AMX"
    return (
        Weights(
            tag="cifar10",
            file=f"{name}.cifar10.safetensors",
            licence="MIT",
            labels="cifar10",
            metrics=tuple(
                Metric(metric, float(value), "CIFAR-10 test (10,000 images)", measured_by)
                for metric, value in zip(names, figures.split(), strict=True)
            ),
            training_data="CIFAR-10 train, all 50,000 images; settings were chosen with 5,000 of them held out",
            recipe=f"{recipe}; all settings are in docs/runs/{name}.cifar10",
            hub_id=hub_id,
            revision=revision,
            sha256=sha256,
            size=size,
            machine=f"{machine}; torch 2.11.0",
            training_seconds=seconds,
            seed=0,
        ),
    )


_SHARED = f"{_CARD}, which trained another model at the same time"
_MIXED = (
    "by a script outside the package, not by convmixer train: 48 epochs, Muon on the 1x1 weights of the blocks and "
    "AdamW on the rest, weight decay 0.1, RandAugment, random erasing, mixup or CutMix of half of the images until "
    "80 % of the run, averaged weights"
)
_PAPER_RECIPE = "AdamW, RandAugment, mixup, CutMix, random erasing, {} epochs at 224 pixels"
_UNTRAINED = "No public weights are known: build it with pretrained=False and train it."

VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="convmixer_1536_20",
        dim=1536,
        depth=20,
        kernel_size=9,
        patch_size=7,
        weights=_imagenet("convmixer_1536_20", 81.37, 86.90, 71.16, _PAPER_RECIPE.format(150)),
    ),
    Variant(
        name="convmixer_768_32",
        dim=768,
        depth=32,
        kernel_size=7,
        patch_size=7,
        act_layer="relu",
        weights=_imagenet("convmixer_768_32", 80.16, 86.22, 69.48, _PAPER_RECIPE.format(300)),
    ),
    Variant(
        name="convmixer_1024_20_ks9_p14",
        dim=1024,
        depth=20,
        kernel_size=9,
        patch_size=14,
        weights=_imagenet("convmixer_1024_20_ks9_p14", 76.94, 83.68, 65.44, "The paper's recipe for ImageNet-1k"),
    ),
    Variant(
        name="convmixer_1024_16",
        dim=1024,
        depth=16,
        kernel_size=9,
        patch_size=7,
        note=_UNTRAINED,
    ),
    Variant(
        name="convmixer_1024_12",
        dim=1024,
        depth=12,
        kernel_size=8,
        patch_size=7,
        note=f"Later papers quote 77.8 % ImageNet-1k top-1. {_UNTRAINED}",
    ),
    Variant(
        name="convmixer_512_16",
        dim=512,
        depth=16,
        kernel_size=8,
        patch_size=7,
        note=f"Later papers quote 73.8 % ImageNet-1k top-1. {_UNTRAINED}",
    ),
    Variant(
        name="convmixer_512_12",
        dim=512,
        depth=12,
        kernel_size=8,
        patch_size=7,
        note=_UNTRAINED,
    ),
    Variant(
        name="convmixer_256_8",
        dim=256,
        depth=8,
        kernel_size=5,
        patch_size=2,
        **_CIFAR10_IMAGES,
        weights=_cifar10(
            "convmixer_256_8",
            recipe="convmixer train cifar10-best --precision bfloat16 --fused --graph",
            machine=_SHARED,
            seconds=456,
            sha256="130948e70532e19cd550adfd7aa08d721f8acb9f21c3e4cd18445a8591c6ccd3",
            size=2422344,
            figures="95.68 99.85 11.20 95.70 95.48",
        ),
    ),
    Variant(
        name="convmixer_256_8_ks9_p1",
        dim=256,
        depth=8,
        kernel_size=9,
        patch_size=1,
        **_CIFAR10_IMAGES,
        note="The paper reports 96.03 % CIFAR-10 top-1 after 200 epochs.",
        weights=_cifar10(
            "convmixer_256_8_ks9_p1",
            recipe=_MIXED,
            machine=_SHARED,
            seconds=547.2,
            sha256="c5a2bdcdd30fd1b54321ad8868a28a7bffe5549dbc5ca068e4fbc0f6fb376694",
            size=2871912,
            figures="95.08 99.87 9.60 95.08 95.07",
        ),
    ),
    Variant(
        name="convmixer_128_8_ks7_p2",
        dim=128,
        depth=8,
        kernel_size=7,
        patch_size=2,
        **_CIFAR10_IMAGES,
        note="From a post that trains it with Flux in Julia.",
        weights=_cifar10(
            "convmixer_128_8_ks7_p2",
            recipe="convmixer train cifar10-best-128 --precision bfloat16 --fused --graph",
            seconds=177,
            sha256="6e0278eaad0c5707a3a29320f9f03f89e7268607aa4e8438f5ade967d6ceecc2",
            size=790472,
            figures="93.87 99.70 6.83 93.94 93.91",
        ),
    ),
)
_BY_NAME = {variant.name: variant for variant in VARIANTS}


def get_variant(name: str) -> tuple[Variant, Weights | None]:
    """Return the variant, and the weights that `variant.tag` names; without a tag its default weights, or None.

    Raises:
        UnknownModelError: No such variant, or no such weights of it.

    Example:
        >>> from convmixer.registry import get_variant
        >>> variant, weights = get_variant("convmixer_256_8.cifar10")
        >>> variant.name, weights.tag
        ('convmixer_256_8', 'cifar10')
    """
    if not isinstance(name, str):
        raise UnknownModelError(f"unknown model {name!r}: give a string such as 'convmixer_256_8'")
    base, dot, tag = name.partition(".")
    if base not in _BY_NAME:
        hint = f"for a repository of the Hub give hf-hub:{name}" if name.count("/") == 1 else nearest(base, _BY_NAME)
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    variant = _BY_NAME[base]
    if not dot:
        return variant, variant.weights[0] if variant.weights else None
    for weights in variant.weights:
        if weights.tag == tag:
            return variant, weights
    known = ", ".join(f"{base}.{w.tag}" for w in variant.weights)
    raise UnknownModelError(f"{base} has no weights {tag!r}; {f'valid: {known}' if known else variant.note}")


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Return the names of the variants that match a shell pattern, sorted.

    Args:
        pattern: Such as "convmixer_256*".
        pretrained: Only the variants that have weights.

    Raises:
        ArgumentError: The pattern is not a string.

    Example:
        >>> convmixer.list_models("convmixer_256_8*")
        ['convmixer_256_8', 'convmixer_256_8_ks9_p1']
    """
    return _matching((v.name for v in VARIANTS if v.weights or not pretrained), pattern)


def list_pretrained(pattern: str = "*") -> list[str]:
    """Return the `variant.tag` names of all weights that match a shell pattern, sorted.

    Raises:
        ArgumentError: The pattern is not a string.

    Example:
        >>> convmixer.list_pretrained("convmixer_768*")
        ['convmixer_768_32.in1k']
    """
    return _matching((f"{v.name}.{w.tag}" for v in VARIANTS for w in v.weights), pattern)


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    if not isinstance(pattern, str):
        raise ArgumentError(f'pattern={pattern!r}: give a string such as "convmixer_256*"')
    return sorted(fnmatch.filter(names, pattern))


def model_info(name: str) -> Variant:
    """Return the record of a variant: parameters, MACs, input size (channels, height, width), and its weights.

    Each set of weights has its source, licence, sha256, size in bytes, metrics, training data and recipe. With
    `variant.tag`, `weights` holds only that set.

    Raises:
        UnknownModelError: No such variant, or no such weights of it.

    Example:
        >>> convmixer.model_info("convmixer_768_32").input_size
        (3, 224, 224)
    """
    variant, weights = get_variant(name)
    if weights is None or "." not in name:
        return variant
    return replace(variant, weights=(weights,))
