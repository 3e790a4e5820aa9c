"""The tensor functions of fused blocks, each by the kernels of the device that its tensors are on.

On CPUs they are those of `reference.py`, which a compiler can look into. On CUDA devices they are the Triton kernels of
`triton.py`, custom operators that a compiler takes whole.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import ConvMixerError, DependencyError
from convmixer.ops import reference

# What the Triton kernels take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = range(3, 12)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise where nothing computes fused blocks: an error that says why.

    Raises:
        DependencyError: A CUDA device without Triton.
        ConvMixerError: A device without kernels, or a type that they do not take.
    """
    if device.type == "cuda":
        try:
            importlib.import_module("convmixer.ops.triton")
        except ImportError as error:
            raise DependencyError(
                f"fused blocks on a GPU need Triton ({error}): pip install triton, or switch them off by "
                "set_fused(False)"
            ) from error
        if dtype not in DTYPES:
            raise ConvMixerError(
                f"fused blocks on a GPU take {', '.join(map(str, DTYPES))}, not {dtype}: use one of them, or switch "
                "them off by set_fused(False)"
            )
    elif device.type not in ("cpu", "meta"):
        raise ConvMixerError(
            f"there are no fused blocks for {device.type!r} devices, only for cpu and cuda: switch them off by "
            "set_fused(False)"
        )


def kernels(x: Tensor) -> Any:
    """The module whose functions, those of `reference.py`, compute on the device of x."""
    if x.device.type == "cuda":
        from convmixer.ops import triton

        return triton
    return reference
