"""What a benchmark compares: a model in every form of this package, timm's model, and a matrix multiplication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convmixer.errors import ArgumentError
from convmixer.runtime.chunks import FixedChunk
from convmixer.runtime.compile import Compiled
from convmixer.runtime.convert import to_onnx, to_openvino
from convmixer.runtime.eager import Eager
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.onnxruntime import OnnxRuntime
from convmixer.runtime.openvino import OpenVINO
from convmixer.runtime.optimize import optimize
from convmixer.wrappers import copy_module

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GEMM_SIDE = 2048  # of the matrices on a CPU; four times that on other devices

Call = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Attributes:
        name: Such as "convmixer openvino".
        dtype: A key of `DTYPES`.
        make: Returns the call to time, and what `optimize` chose, in words.
    """

    name: str
    dtype: str
    make: Callable[[], tuple[Call, str]]


# ---- this package ---------------------------------------------------------------------------------------------------


def our_candidates(
    model: Any,
    images: Tensor,
    backends: Sequence[str],
    dtypes: Sequence[str],
    calibration: Tensor | None,
    *,
    asked: bool = False,
) -> list[Candidate]:
    """Return a model as it is, and optimized in each backend, in each type that the backend computes in.

    With `asked` the backends come with all types: what one does not compute fails, and says why.
    """
    found = []
    for dtype in dtypes:
        if dtype != "int8":
            found.append(Candidate("convmixer unfolded", dtype, partial(_unfolded, model, images, DTYPES[dtype])))
        for backend in backends:
            if not asked and dtype == "int8" and backend not in ("native", "openvino"):
                continue
            if not asked and dtype != "float32" and backend == "onnxruntime":
                continue
            make = partial(_optimized, model, images, DTYPES[dtype], backend, calibration)
            found.append(Candidate(f"convmixer {backend}", dtype, make))
    return found


def _unfolded(model: Any, images: Tensor, dtype: torch.dtype) -> tuple[Call, str]:
    cast = copy_module(model).to(dtype)
    inputs = images.to(dtype)
    return lambda: cast(inputs), ""


def _optimized(
    model: Any, images: Tensor, dtype: torch.dtype, backend: str, calibration: Tensor | None
) -> tuple[Call, str]:
    if backend == "eager":
        folded = optimize(model, dtype=dtype)
        inputs = images.to(dtype)
        return lambda: folded(inputs), "the folded module"
    # Where a graph costs little, the chunk size is chosen by trial; compiling takes too long for that.
    example = None if backend == "compile" else images
    ranges = calibration if dtype == torch.int8 else None
    fast = optimize(model, backend=backend, dtype=dtype, example=example, calibration=ranges)
    return lambda: fast(images), str(fast.choice)


# ---- timm -----------------------------------------------------------------------------------------------------------


def timm_candidates(model: Any, images: Tensor, dtypes: Sequence[str]) -> list[Candidate]:
    """Return timm's model as its users would run it; in OpenVINO with one stream, and with one for each core."""
    threads = torch.get_num_threads()
    found = []
    for name in dtypes:
        if name == "int8":
            continue
        make = partial(_timm_eager, model, images, DTYPES[name])
        found += [
            Candidate("timm eager", name, partial(make, torch.contiguous_format, Eager)),
            Candidate("timm channels_last", name, partial(make, torch.channels_last, Eager)),
            Candidate("timm compile", name, partial(make, torch.channels_last, Compiled)),
        ]
        if images.device.type == "cpu":
            if name == "float32":
                found.append(Candidate("timm onnxruntime", name, partial(_timm_onnxruntime, model, images)))
            make = partial(_timm_openvino, model, images, DTYPES[name])
            found.append(Candidate("timm openvino", name, partial(make, 1)))
            if 1 < threads <= len(images):
                found.append(Candidate(f"timm openvino, {threads} streams", name, partial(make, threads)))
    return found


def _timm_eager(
    model: Any,
    images: Tensor,
    dtype: torch.dtype,
    layout: torch.memory_format,
    runtime: Callable[[nn.Module], Callable[[Tensor], list[Tensor]]],
) -> tuple[Call, str]:
    peer = timms(model).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    inputs = images.to(dtype=dtype, memory_format=layout)
    compute = runtime(peer)
    return lambda: compute(inputs)[0], ""


def _timm_openvino(model: Any, images: Tensor, dtype: torch.dtype, streams: int) -> tuple[Call, str]:
    chunk_rule = None if streams == 1 else FixedChunk(-(-len(images) // streams))
    compute = OpenVINO(to_openvino(timms(model)), dtype, torch.get_num_threads(), chunk_rule)
    return lambda: compute(images)[0], ""


def _timm_onnxruntime(model: Any, images: Tensor) -> tuple[Call, str]:
    compute = OnnxRuntime(to_onnx(timms(model)), torch.get_num_threads(), None)
    return lambda: compute(images)[0], ""


def timms(model: Any) -> nn.Module:
    """Return timm's own ConvMixer with the weights of ours, in evaluation mode."""
    from timm.models.convmixer import ConvMixer

    inner: Any = find_convmixer(model)
    act, pool = type(inner.stem[1]), inner.global_pool.pool_type
    if pool != "avg":
        raise ArgumentError(f"timm's ConvMixer has global_pool='avg', this model {pool!r}")
    peer: nn.Module = ConvMixer(
        inner.dim,
        len(inner.blocks),
        kernel_size=inner.blocks[0][0].fn[0].kernel_size[0],
        patch_size=inner.patch_size,
        in_chans=inner.in_chans,
        num_classes=inner.num_classes,
        act_layer=act,
    )
    peer.load_state_dict(inner.state_dict())
    return peer.to(next(inner.parameters()).device).eval()


# ---- the ceiling ----------------------------------------------------------------------------------------------------


def gemm_side(device: torch.device) -> int:
    return GEMM_SIDE if device.type == "cpu" else 4 * GEMM_SIDE


def gemm(dtype: str, device: torch.device) -> Candidate:
    """Return the multiplication of two square matrices by PyTorch."""
    side = gemm_side(device)
    return Candidate(f"gemm {side}", dtype, partial(_gemm, dtype, device, side))


def _gemm(dtype: str, device: torch.device, side: int) -> tuple[Call, str]:
    generator = torch.Generator().manual_seed(0)
    if dtype == "int8":
        a, b = (torch.randint(-9, 9, (side, side), generator=generator, dtype=torch.int8).to(device) for _ in "ab")
        return lambda: torch._int_mm(a, b), ""
    a, b = (torch.randn(side, side, generator=generator).to(device, DTYPES[dtype]) for _ in "ab")
    return lambda: a @ b, ""
