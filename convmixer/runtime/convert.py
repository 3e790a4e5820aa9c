"""A ConvMixer as an OpenVINO model and as an ONNX file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from convmixer.runtime.choose import _require
from convmixer.tracing import quietly, tracing
from convmixer.wrappers import find_inner


def _dynamic(module: nn.Module) -> tuple[dict[str, Any], Tensor]:
    """Arguments for torch.export with batch and image size left open, and an example.

    The example is larger than any kernel, and odd in its sizes, so that no dimension is taken for a constant.
    """
    stem = find_inner(module).stem[0]
    patch = stem.kernel_size[0]
    example = torch.zeros(2, stem.in_channels, 13 * patch, 11 * patch, dtype=stem.weight.dtype)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return {"dynamic_shapes": (dynamic,)}, example


def to_openvino(module: nn.Module) -> Any:
    """An `openvino.Model` of a ConvMixer in float32 on the CPU; batch, height and width are open."""
    _require("openvino")
    import openvino

    options, example = _dynamic(module)
    private = copy.deepcopy(module)  # OpenVINO reads the weights where they lie, and PyTorch may move a module's own
    with tracing(), quietly(), torch.no_grad():  # the exporters' own dependencies warn
        return openvino.convert_model(torch.export.export(private, (example,), **options))


def to_onnx(module: nn.Module) -> bytes:
    """An ONNX file of a ConvMixer in float32 on the CPU; batch, height and width are open."""
    _require("onnxruntime")
    options, example = _dynamic(module)
    with tracing(), quietly(), torch.no_grad():
        program: Any = torch.onnx.export(module, (example,), dynamo=True, verbose=False, **options)
    data: bytes = program.model_proto.SerializeToString()
    return data
