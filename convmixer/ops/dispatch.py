"""The tensor functions of fused blocks, each by the kernels of the device that its tensors are on.

On CPUs they are those of `reference.py`, which a compiler can look into. On CUDA devices they are the Triton kernels of
`triton/launch.py`, custom operators that a compiler takes whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from convmixer.errors import ConvMixerError, DependencyError
from convmixer.ops import reference
from convmixer.ops.limits import DTYPES, KERNEL_SIZES, unsupported


def check(device: torch.device, dtype: torch.dtype, kernel_sizes: Iterable[int]) -> None:
    """Raise where nothing computes fused blocks: an error that says why.

    Args:
        device: Of the model.
        dtype: Of its feature maps.
        kernel_sizes: Of its depthwise convolutions.

    Raises:
        DependencyError: A CUDA device without Triton.
        ConvMixerError: A device without kernels, or a type or a kernel size that they do not take.
    """
    off = "switch them off by set_fused(False)"
    if device.type == "cuda":
        try:
            importlib.import_module("convmixer.ops.triton.launch")
        except ImportError as error:
            raise DependencyError(
                f"fused blocks on a GPU need Triton ({error}): pip install triton, or {off}"
            ) from error
        if not torch.compiler.is_dynamo_compiling() and (lacking := unsupported(device)):
            raise ConvMixerError(f"there are no fused blocks for {str(device)!r}, {lacking}: {off}")
        if dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ConvMixerError(f"fused blocks on a GPU take {known}, not {dtype}: use one of them, or {off}")
        for size in kernel_sizes:
            if size not in KERNEL_SIZES:
                valid = f"{KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
                raise ConvMixerError(
                    f"fused blocks on a GPU take kernels of {valid}, this model has kernel_size={size}: {off}"
                )
    elif device.type not in ("cpu", "meta"):
        raise ConvMixerError(f"there are no fused blocks for {device.type!r} devices, only for cpu and cuda: {off}")


def kernels(x: Tensor) -> ModuleType:
    """Return the module with the functions of `reference.py` for the device of x."""
    if x.device.type == "cuda":
        from convmixer.ops.triton import launch

        return launch
    return reference
