"""The one way to an exported program, to ONNX and to OpenVINO, for `optimize` and `export_model` alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmixer.errors import optional
from convmixer.tracing import quietly, tracing
from convmixer.wrappers import copy_module, find_inner

if TYPE_CHECKING:
    import openvino

Dimensions = dict[int, Any]  # axis of the images -> the `torch.export.Dim` that leaves it open


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Trace as the module computes: without the caller's autocast, which converters record, and without gradients."""
    with tracing(), quietly(), torch.no_grad(), torch.autocast("cpu", enabled=False):  # dependencies of exporters warn
        yield


def open_dimensions() -> Dimensions:
    """Leave batch, height and width open."""
    return dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)


def open_example(module: nn.Module) -> Tensor:
    """Return images larger than any kernel, and odd in their sizes, so that no dimension is taken for a constant."""
    stem = find_inner(module).stem[0]
    patch = stem.kernel_size[0]
    return torch.zeros(2, stem.in_channels, 13 * patch, 11 * patch, dtype=stem.weight.dtype)


def to_program(module: nn.Module, example: Tensor, dimensions: Dimensions) -> torch.export.ExportedProgram:
    """Trace a module with one input."""
    with _exact():
        return torch.export.export(module, (example,), dynamic_shapes=(dimensions,))


def to_openvino(
    module: nn.Module, example: Tensor | None = None, dimensions: Dimensions | None = None
) -> openvino.Model:
    """Convert a module in float32 on the CPU.

    Args:
        module: A ConvMixer of any kind, or with an `example` any module with one input.
        example: Images (B, C, H, W); None: some that fit a ConvMixer.
        dimensions: Which of them stay open; None: batch, height and width.
    """
    runtime = optional("openvino", "openvino", "export")
    example = open_example(module) if example is None else example
    private = copy_module(module)  # OpenVINO reads the weights in place, and PyTorch may move a module's own
    with _exact():
        model: openvino.Model = runtime.convert_model(to_program(private, example, dimensions or open_dimensions()))
    return model


def to_onnx_program(
    module: nn.Module, example: Tensor, dimensions: Dimensions, **options: Any
) -> torch.onnx.ONNXProgram:
    """Convert a module on the CPU; `options` are those of `torch.onnx.export`."""
    with _exact():
        program = torch.onnx.export(
            module, (example,), dynamo=True, verbose=False, dynamic_shapes=(dimensions,), **options
        )
    assert program is not None  # as it is only without dynamo
    return program


def to_onnx(module: nn.Module) -> bytes:
    """Convert a ConvMixer in float32 on the CPU to the bytes of an ONNX file; batch, height and width stay open."""
    optional("onnxscript", "onnxruntime", "export")
    program = to_onnx_program(module, open_example(module), open_dimensions())
    data: bytes = program.model_proto.SerializeToString()
    return data
