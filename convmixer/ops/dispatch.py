"""The tensor functions of fused blocks, each by the kernels of the device that its tensors are on.

On CPUs they are those of `reference.py`, which a compiler can look into. On CUDA devices they are the Triton kernels,
as custom operators `convmixer::NAME` with a rule for fake tensors, so that `torch.compile` takes them whole.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import ConvMixerError, DependencyError
from convmixer.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


_SCHEMAS = {
    "normalize_act": "(Tensor u, Tensor scale, Tensor shift, str act) -> Tensor",
    "normalize_act_grad": "(Tensor grad, Tensor u, Tensor scale, str act) -> (Tensor, Tensor, Tensor)",
    "stats_grad": "(Tensor grad_u, Tensor u, str act, Tensor center, Tensor grad_s, Tensor grad_q) -> Tensor",
    "depthwise": "(Tensor x, Tensor weight, Tensor bias, str act, Tensor center) -> (Tensor, Tensor, Tensor)",
    "depthwise_infer": "(Tensor x, Tensor weight, Tensor bias, str act, Tensor scale, Tensor shift, Tensor residual)"
    " -> Tensor",
    "depthwise_input_grad": "(Tensor grad, Tensor weight) -> Tensor",
    "depthwise_weight_grad": "(Tensor x, Tensor grad, int kernel_size) -> (Tensor, Tensor)",
    "pointwise": "(Tensor c, Tensor scale1, Tensor shift1, Tensor x, Tensor weight, Tensor bias, str act, "
    "Tensor center) -> (Tensor, Tensor, Tensor)",
    "pointwise_infer": "(Tensor z, Tensor weight, Tensor bias, str act, Tensor scale, Tensor shift) -> Tensor",
}


def _fake(name: str) -> Any:
    """What an operator returns, without its values: feature maps are like the first tensor, vectors float32 (C,)."""

    def vector(x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(shape or x.shape[1:2], dtype=torch.float32)

    def feature_map(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.channels_last)  # whatever the layout of x

    def result(x: Tensor, *others: Any) -> Any:
        if name in ("depthwise", "pointwise", "normalize_act_grad"):
            return feature_map(x), vector(x), vector(x)
        if name == "depthwise_weight_grad":
            return vector(x, x.shape[1], 1, others[1], others[1]), vector(x)
        return feature_map(x)

    return result


def _kernel(name: str) -> Any:
    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("convmixer.ops.triton"), name)(*arguments)

    return call


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"convmixer::{_name}", _schema)
    torch.library.impl(f"convmixer::{_name}", "CUDA")(_kernel(_name))
    torch.library.register_fake(f"convmixer::{_name}")(_fake(_name))


def kernels(x: Tensor) -> Any:
    """The functions of `reference.py` for the device of x, as attributes."""
    return torch.ops.convmixer if x.device.type == "cuda" else reference
