"""What backends there are, what each needs, and what `optimize` chose."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from convmixer.errors import DependencyError, missing
from convmixer.hardware import has_int8_tiles
from convmixer.native import library as native
from convmixer.ops.dispatch import DTYPES, unsupported
from convmixer.runtime import openvino_core

BACKENDS = ("auto", "eager", "compile", "openvino", "onnxruntime", "native", "triton")


_NEEDS = {  # modules of each runtime, and the extra that brings them
    "openvino": (("openvino",), "export"),
    "onnxruntime": (("onnxruntime", "onnxscript"), "export"),
    "int8": (("nncf",), "int8"),
}
# What OpenVINO calls the types.
_CAPABILITIES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16", torch.int8: "INT8"}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Choice:
    """What `optimize` chose, and why.

    Attributes:
        backend: One of `BACKENDS`, but not "auto".
        dtype: Type that it computes in, such as "bfloat16".
        device: Where.
        layout: "channels_last" or "contiguous" activations; "own" where the runtime decides.
        threads: Threads that compute one call; 0 on a GPU.
        pieces: Into what batches are cut.
        reason: Why, in words.
    """

    backend: str
    dtype: str
    device: str
    layout: str
    threads: int
    pieces: str
    reason: str

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        where = f"{self.dtype} on {self.device}, {self.layout} layout{threads}, {self.pieces}"
        return f"{self.backend}, {where}: {self.reason}"


def _missing(backend: str, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> str | None:
    """What the backend lacks here, and how to get it; None if nothing."""
    if backend == "openvino" and dtype == torch.int8 and (lacking := _missing("int8")):
        return lacking
    modules, extra = _NEEDS.get(backend, ((), ""))
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        return missing(backend, absent, extra)
    if backend == "compile" and (lacking := native.inductor_lacks(device)):
        return f"compile {lacking}"
    if device.type == "cpu" and backend == "native" and native.compiler() is None:
        return "native needs a C++ compiler on a CPU, and there is none: install g++ or clang++, or name one in CXX"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton needs triton on a GPU, which is missing: pip install triton"
    return None


def _require(backend: str, device: torch.device = _CPU, dtype: torch.dtype | None = None) -> None:
    if lacking := _missing(backend, device, dtype):
        raise DependencyError(lacking)


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends that can compute in `dtype` on `device` with what is installed, the usually fastest first."""
    device = torch.device(device)
    ordered = ["triton", "compile", "eager"]  # as measured in bfloat16 on an H200: benchmarks/gpu.py
    if dtype == torch.float32:  # in which products by triton take three of TF32
        ordered = ["compile", "triton", "eager"]
    if device.type == "cpu":
        ordered = ["native", "openvino", "compile", "eager"]
        if dtype == torch.float32:
            ordered = ["native", "openvino", "onnxruntime", "compile", "eager"]
    elif device.type != "cuda":
        ordered = ["eager"]
    return tuple(b for b in ordered if not _unsupported(b, device, dtype) and not _missing(b, device, dtype))


def _unsupported(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend does not compute in this type on this device, by its nature; None if it does."""
    if backend in ("openvino", "onnxruntime", "native") and device.type != "cpu":
        return f"backend={backend!r} computes on the CPU, this model is on {device}: call model.cpu() first"
    if backend == "onnxruntime" and dtype != torch.float32:
        return f"dtype={dtype}: onnxruntime computes convolutions on a CPU in float32 alone; use openvino or compile"
    if backend == "openvino" and dtype not in _CAPABILITIES:
        return f"dtype={dtype}: openvino computes in float32, bfloat16, float16 or int8"
    if backend == "openvino" and not _missing(backend) and _CAPABILITIES[dtype] not in _openvino_types():
        return f"dtype={dtype}: openvino finds no products of that type in this CPU; use torch.float32"
    if backend == "native" and not torch.cpu._is_avx512_supported():
        return "backend='native' needs a CPU with AVX-512; choose another one, such as openvino"
    if backend == "native" and dtype == torch.int8 and not has_int8_tiles():
        return f"dtype={dtype}: native computes in int8 on CPUs with AMX and AVX512-VBMI; use openvino"
    if backend == "native" and dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"dtype={dtype}: native computes in float32, bfloat16 or int8"
    if backend == "triton" and device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        return f"backend='triton' computes on CUDA devices, this model is on {device}: call model.cuda() first"
    if backend == "triton" and device.type == "cuda" and torch.cuda.is_available() and (lacking := unsupported(device)):
        return f"backend='triton': {lacking}; use compile"
    if backend == "triton" and dtype not in DTYPES:
        return f"dtype={dtype}: triton computes in bfloat16, float16 or float32"
    if backend in ("eager", "compile") and dtype == torch.int8:
        return f"dtype={dtype}: give a floating point type such as torch.bfloat16, or backend='auto' with it"
    return None


@functools.lru_cache(maxsize=1)
def _openvino_types() -> tuple[str, ...]:
    return tuple(openvino_core.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
