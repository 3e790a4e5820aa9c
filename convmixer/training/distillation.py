"""Knowledge distillation: a student learns from the answers of a trained teacher besides the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network" (https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.errors import ArgumentError, WeightsError, brief, first_line
from convmixer.factory import open_model
from convmixer.hub.checkpoints import digest
from convmixer.model import ConvMixer
from convmixer.registry import list_models
from convmixer.runtime.optimize import optimize
from convmixer.transforms import preprocessing
from convmixer.wrappers import find_inner, in_channels


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute how far a student is from its teacher, both softened by a temperature.

    Args:
        logits: Of the student (B, classes).
        teacher_logits: Of the teacher (B, classes).
        temperature: What logits are divided by; above 1, the less likely classes count more.

    Returns:
        The Kullback-Leibler divergence, a mean over the batch, times the squared temperature: the gradients then keep
        their size at every temperature.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Teacher:
    """A trained model that answers a student's inputs with logits, in the order of the student's classes.

    Args:
        name: A name of `create_model`, the folder of a run, a .safetensors file, or the name of a model of timm.
        config: The student's `pretrained_cfg`: the mean and std that its inputs are normalised by.
        classes: The student's classes.
        device: Where the student learns.
        dtype: Type to compute in.
        sizes: (height, width) of the student's inputs, all that come. A teacher that takes only one size gets them
            resized to it.
        report: Called with a line that says what was understood.

    Attributes:
        checksum: Of its weights, its classes and its preprocessing.

    Raises:
        ArgumentError: A teacher of other classes, other channels or other image sizes.
        ConvMixerError: As `create_model`.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        classes: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        *,
        sizes: Collection[tuple[int, int]],
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        model = _open(name, device)
        own = preprocessing(model) if getattr(model, "pretrained_cfg", None) else config
        _check_channels(model, name, config)
        self.checksum = _checksum(model, own)
        self.size = _only_size(own)
        for size in sorted(set(sizes)):
            if self.size not in (None, size):
                to, shown = (f"{height}x{width}" for height, width in (self.size, size))
                report(f"the teacher {name!r} takes only images of {to} pixels: those of {shown} are resized for it")
        for size in sorted({self.size or size for size in sizes}):
            _check_size(model, name, size, len(config["mean"]))
        self.order = _order(model, name, classes, device, report)
        # x -> scale*x + shift takes the student's normalisation to the teacher's.
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (config["mean"], config["std"], own["mean"], own["std"])
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.same = bool((self.scale == 1).all() and (self.shift == 0).all())
        self.compute = _fastest(model, dtype)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes) in float32 for normalised inputs (B, C, H, W) of the student."""
        x = inputs if self.same else torch.addcmul(self.shift, inputs, self.scale)
        if self.size and self.size != x.shape[2:]:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        logits = self.compute(x).float()
        return logits if self.order is None else logits[:, self.order]


def _open(name: str, device: torch.device) -> nn.Module:
    """Return a teacher with its weights, in inference mode."""
    ours = name in list_models() or name.split(".")[0] in list_models()
    if not ours and timm.is_model(name):
        try:
            model: nn.Module = timm.create_model(name, pretrained=True)
        except Exception as error:  # timm's, or of the Hub's client
            raise WeightsError(
                f"teacher={name!r}: timm cannot load its weights: {error}. Give the folder of a run, or a name of "
                "`convmixer list`"
            ) from error
    else:
        model = open_model(name, device=device)
    return model.to(device).eval().requires_grad_(False)


def _check_channels(model: nn.Module, name: str, config: dict[str, Any]) -> None:
    taken = in_channels(model)
    if taken != len(config["mean"]):
        raise ArgumentError(
            f"teacher={name!r} takes images of {taken} channels, the student of {len(config['mean'])}: set "
            f"in_chans={taken}"
        )


def _only_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) to which timm has built a model; None if it takes others, too."""
    if not config.get("fixed_input_size"):
        return None
    _, height, width = config["input_size"]
    return height, width


@torch.no_grad()
def _check_size(model: nn.Module, name: str, size: tuple[int, int], channels: int) -> None:
    """Raise an ArgumentError if a teacher cannot compute images (height, width)."""
    try:
        parameter = next(model.parameters())
        model(torch.zeros(1, channels, *size, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:  # each architecture has its own
        raise ArgumentError(
            f"teacher={name!r} does not take images of {size[0]}x{size[1]} pixels: {first_line(error)}. Give another "
            "teacher, or larger images (input_size, image_sizes)"
        ) from error


def _checksum(model: nn.Module, config: Mapping[str, Any]) -> str:
    """Return a hash of everything that decides a teacher's answers."""
    parts = [digest(model), *(config.get(name) for name in ("mean", "std", "label_names"))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _order(
    model: nn.Module, name: str, classes: Sequence[str], device: torch.device, report: Callable[[str], None]
) -> Tensor | None:
    """Return where the teacher has each class; None if in the same order."""
    labels = list((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    count = getattr(model, "num_classes", None)
    if not labels and count == len(classes):
        report(f"the teacher {name!r} names no classes: its {count} are taken to be those of the images, in order")
        return None
    if sorted(labels) != sorted(classes):
        theirs = f"{len(labels)} classes: {brief(', '.join(labels))}" if labels else f"{count} classes without names"
        raise ArgumentError(
            f"teacher={name!r} knows {theirs}; the images have {len(classes)}: {brief(', '.join(classes))}. Give a "
            "teacher that was trained on these classes"
        )
    if labels == list(classes):
        return None
    return torch.tensor([labels.index(label) for label in classes], device=device)


def _fastest(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a ConvMixer in its fastest backend; another model as it is, under autocast."""
    if isinstance(find_inner(model), ConvMixer):
        optimized: Callable[[Tensor], Tensor] = optimize(model, backend="auto", dtype=dtype)
        return optimized
    device = next(model.parameters()).device.type

    def compute(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits: Tensor = model(x)
            return logits

    return compute
