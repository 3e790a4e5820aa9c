"""Which backend computes a model: the table of backends, their order by rule, and the fastest by measurement."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from convmixer.errors import ArgumentError, DependencyError
from convmixer.hardware import has_tiles
from convmixer.runtime.compile import CompileBackend
from convmixer.runtime.eager import EagerBackend
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.native import NativeBackend
from convmixer.runtime.onnxruntime import OnnxRuntimeBackend
from convmixer.runtime.openvino import OpenVINOBackend
from convmixer.runtime.optimized_model import OptimizedConvMixer
from convmixer.runtime.protocol import Backend, Choice, Prepared, Request, dtype_name
from convmixer.runtime.triton import TritonBackend

_ALL: tuple[Backend, ...] = (
    EagerBackend(),
    CompileBackend(),
    OpenVINOBackend(),
    OnnxRuntimeBackend(),
    NativeBackend(),
    TritonBackend(),
)
_BY_NAME = {backend.name: backend for backend in _ALL}
BACKENDS = ("auto", *_BY_NAME)  # what `optimize(backend=...)` takes
NATIVE_DIM = 512  # above it OpenVINO is faster where there is no AMX: measured with 256 and 768 channels
TIMED_ROUNDS = 5

_LOGGER = logging.getLogger(__name__)


def check_backend(name: str) -> None:
    """Raise an ArgumentError for a name that `optimize(backend=...)` does not take."""
    if name not in BACKENDS:
        raise ArgumentError(f"unknown backend {name!r}; valid: {', '.join(BACKENDS)}")


def find_backend(name: str) -> Backend:
    """Return a backend by its name, not "auto"."""
    return _BY_NAME[name]


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Return the backends that can compute in `dtype` on `device` with what is installed, usually the fastest first.

    Example:
        >>> from convmixer.runtime.choose import available_backends
        >>> "eager" in available_backends("cpu", torch.bfloat16)
        True
    """
    device = torch.device(device)
    return tuple(
        name
        for name in _usual_order(device, dtype)
        if not _BY_NAME[name].unsupported(device, dtype) and not _BY_NAME[name].missing(device, dtype)
    )


def _usual_order(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("native", "openvino", "onnxruntime", "compile", "eager")
    if device.type != "cuda":
        return ("eager",)
    if dtype == torch.float32:  # for which Triton adds up three matrix multiplications in TF32
        return ("compile", "triton", "eager")
    return ("triton", "compile", "eager")  # as measured in bfloat16 on an H200: benchmarks/gpu.py


def candidates(
    name: str, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Backend, ...], str]:
    """Return the backends that may compute a model, usually the fastest first, and why the first one is.

    Raises:
        ArgumentError: The backend that was asked for does not compute this model in this type on this device.
        DependencyError: It is not installed.
    """
    if name != "auto":
        backend = find_backend(name)
        if problem := backend.unsupported(device, dtype) or backend.refuses(model, dtype):
            raise ArgumentError(problem)
        if lacking := backend.missing(device, dtype):
            raise DependencyError(lacking)
        return (backend,), "as asked"
    found = [n for n in available_backends(device, dtype) if not find_backend(n).refuses(model, dtype)]
    if not found:  # only for int8, which openvino computes everywhere
        return candidates("openvino", model, device, dtype)
    if "openvino" in found and find_convmixer(model).dim > NATIVE_DIM and not has_tiles():
        found.sort(key=lambda n: n != "openvino")
    absent = [
        lacking
        for n in ("native", "openvino", "compile", "onnxruntime")
        if n not in found
        and not find_backend(n).unsupported(device, dtype)
        and (lacking := find_backend(n).missing(device, dtype))
    ]
    reason = f"by rule the fastest of {', '.join(found)} for {dtype_name(dtype)} on {device.type}"
    return tuple(map(find_backend, found)), "; ".join([reason, *absent])


def first_that_works(
    request: Request, backends: Sequence[Backend], chunk: int | None, reason: str
) -> OptimizedConvMixer:
    """Build the first backend that can be built; the reason says why those before it cannot."""
    for backend in backends[:-1]:
        try:
            backend.trial(request.device)
            return _build(request, backend, backend.prepare(request), chunk, reason)
        except DependencyError as error:
            reason += f"; {error}"
            _LOGGER.warning("backend='auto' goes on without %s: %s", backend.name, error)
    return _build(request, backends[-1], backends[-1].prepare(request), chunk, reason)


def fastest(request: Request, backends: Sequence[Backend], chunk: int | None, example: Tensor) -> OptimizedConvMixer:
    """Build every backend in several chunk sizes, and return what is fastest for the example.

    The reason says how long each took, and why others cannot be built.

    Raises:
        DependencyError: None can be built.
    """
    models, failures = [], ""
    for backend in backends:
        try:
            prepared = backend.prepare(request)
            for size in (chunk,) if chunk else backend.chunks_to_time(request, example):
                model = _build(request, backend, prepared, size)
                model(example)  # compiles what has to be compiled
                models.append(model)
        except DependencyError as error:
            if len(backends) == 1:
                raise
            failures += f"; {error}"
    if not models:
        raise DependencyError(f"no backend can be built: {failures.removeprefix('; ')}")
    medians = _median_seconds(models, example)
    ranked = sorted(range(len(models)), key=medians.__getitem__)
    times = ", ".join(
        f"{models[i].choice.backend} in {models[i].choice.chunks} {1000 * medians[i]:.2f} ms" for i in ranked
    )
    best = models[ranked[0]]
    best.choice = replace(best.choice, reason=f"fastest for {tuple(example.shape)}: {times}{failures}")
    return best


def _build(
    request: Request, backend: Backend, prepared: Prepared, chunk: int | None, reason: str = ""
) -> OptimizedConvMixer:
    built = backend.build(request, prepared, chunk)
    choice = Choice(
        backend=backend.name,
        dtype=request.precision,
        device=str(request.device),
        layout=built.layout,
        threads=built.threads,
        chunks=built.chunks,
        reason=reason,
    )
    return OptimizedConvMixer(prepared.folded, built.runtime, choice)


def _median_seconds(models: Sequence[OptimizedConvMixer], example: Tensor) -> list[float]:
    """Time models that take turns; the first round only warms up."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(1 + TIMED_ROUNDS):
        for model, times in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            model(example)
            if example.is_cuda:
                torch.cuda.synchronize(example.device)
            if turn:
                times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]
