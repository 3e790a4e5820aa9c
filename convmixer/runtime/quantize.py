"""int8: calibration images, quantization by NNCF, and a check of what int8 computes."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError, optional
from convmixer.inference import preparation
from convmixer.model import check_input
from convmixer.runtime import openvino_core
from convmixer.runtime.chunks import as_list
from convmixer.tracing import computing, quietly
from convmixer.wrappers import describe, find_inner

if TYPE_CHECKING:
    import openvino

CALIBRATION_IMAGES = 512
CHECKED_IMAGES = 64  # calibration images for which int8 is compared with float32
MOST_LOST = 0.25  # of the outputs' norm, by int8; a model that loses more classifies differently

_LOGGER = logging.getLogger(__name__)


def quantize(model: openvino.Model, images: Tensor) -> openvino.Model:
    """Quantize the convolutions of an OpenVINO model to int8, by NNCF's post-training quantization.

    Args:
        model: From `to_openvino`, of a model folded with `divide=False`.
        images: As the model takes them, (N, C, H, W).
    """
    nncf = optional("nncf", "int8", "int8")
    data = nncf.Dataset([image[None].numpy() for image in images.detach().cpu().float()])
    preset = nncf.QuantizationPreset.MIXED  # activations after GELU are lopsided
    logger = logging.getLogger("nncf")  # writes to standard output, which may be somebody's JSON
    with quietly(), contextlib.redirect_stdout(io.StringIO()):  # progress bars
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            return openvino_core.aside(lambda: nncf.quantize(model, data, preset=preset, subset_size=len(images)))
        finally:
            logger.setLevel(level)


@torch.inference_mode()
def check_int8(runtime: Callable[[Tensor], list[Tensor]], folded: nn.Module, images: Tensor) -> None:
    """Raise a ConvMixerError where eight bits do not hold what the model computes of calibration images."""
    with computing():
        pairs = list(zip(runtime(images), as_list(folded(images)), strict=True))
    for output, expected in pairs:
        lost = float((output.float() - expected).norm() / expected.norm())
        if not lost <= MOST_LOST:
            raise ConvMixerError(
                f"int8 changes the outputs for the calibration images by {lost:.0%} of their size, at most "
                f"{MOST_LOST:.0%} is accepted: these weights do not fit eight bits. Use dtype=torch.bfloat16"
            )


def calibration_images(
    source: Tensor | str | Path | None, model: nn.Module, *, report: Callable[[str], None] = _LOGGER.info
) -> Tensor:
    """Return at most `CALIBRATION_IMAGES` training images as the model takes them, (N, C, H, W).

    Args:
        source: The images, or a folder, a tar or a name from which they are read. They need no labels.
        model: A ConvMixer, which says how images are prepared.
        report: Takes a line about which images were taken.
    """
    inner: Any = find_inner(model)
    if isinstance(source, Tensor):
        if not len(source):
            raise ArgumentError("calibration holds no images: give at least one, better some hundreds")
        check_input(source, inner.in_chans, inner.patch_size)
        if not source.is_floating_point():
            raise ArgumentError(
                f"calibration of {source.dtype}: give images as the model takes them, normalised floats"
            )
        images = source[:CALIBRATION_IMAGES]
        if not images.isfinite().all():
            raise ArgumentError("calibration holds NaN or infinity: leave those images out")
        return images
    if not isinstance(source, str | Path):
        raise ArgumentError(
            f"calibration is {describe(source)}: give a tensor (N, C, H, W) of images as the model takes them, or a "
            "folder, a tar or a name such as torch/cifar10"
        )
    from convmixer.data.readers import Split, open_split  # only needed here

    prepare = preparation(inner)
    opened = open_split(str(source), "train", labelled=False)
    report(f"calibration, {opened.taken}")
    if isinstance(opened, Split):  # spread over all classes, which may lie one after the other
        step = max(len(opened) / CALIBRATION_IMAGES, 1)
        samples: Any = (opened.read(int(i * step), prepare) for i in range(min(len(opened), CALIBRATION_IMAGES)))
    else:
        samples = opened.in_order(prepare)
    return torch.stack([image for image, _ in itertools.islice(samples, CALIBRATION_IMAGES)])
