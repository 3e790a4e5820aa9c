"""Speed of a model in every form at hand, side by side in one process: ours and timm's, by runtime and precision.

All candidates of a case take turns, round after round, so that what disturbs the machine disturbs all of them. A round
gives each candidate at least a set time, after one call that is not timed. Ratios are taken within rounds. The ceiling
is a square matrix product by PyTorch, timed in the same rounds.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.factory import create_model, open_model, resolve_device
from convmixer.hardware import cpu_field, cpu_name
from convmixer.registry import get_variant
from convmixer.runtime.choose import BACKENDS
from convmixer.runtime.compile import Compiled
from convmixer.runtime.convert import to_onnx, to_openvino
from convmixer.runtime.eager import Whole
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.onnxruntime import OnnxRuntime
from convmixer.runtime.openvino import OpenVINO
from convmixer.runtime.optimize import optimize
from convmixer.runtime.quantize import calibration_images

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GEMM_SIDE = 2048  # of the matrices on a CPU; four times that on other devices
REFERENCE_IMAGES = 4  # of each batch that are computed in float64


@dataclass
class Result:
    """One candidate.

    Attributes:
        name: Such as "convmixer openvino".
        dtype: What it computes in.
        images_per_second: Median over rounds; None if it failed.
        slowest, fastest: The slowest and the fastest round, in images per second.
        latency_ms: Time of one call in milliseconds: "p50", "p90", "p99" over all calls.
        calls: Number of timed calls.
        peak_memory_mib: What it took to make it and to call it for the first time, above what the process held
            before: GPU memory on a GPU, resident memory on Linux, else None.
        relative_error: Of the logits against the original model in float64: norm of the difference by norm.
        ceiling_share: Floating point operations per second, by those of the matrix product in the same precision.
        choice: What `optimize` said that it chose.
        failure: Why there are no figures.
    """

    name: str
    dtype: str
    images_per_second: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    peak_memory_mib: float | None = None
    relative_error: float | None = None
    ceiling_share: float | None = None
    choice: str = ""
    failure: str = ""


@dataclass
class Ratio:
    """Our fastest candidate against timm's fastest one in the same precision: median, least and largest by round."""

    dtype: str
    ours: str
    peer: str
    ratio: float
    least: float
    largest: float


@dataclass
class Case:
    """One batch size at one image size.

    Attributes:
        gemm_gflops: Of the matrix product, by precision: median over rounds.
    """

    batch_size: int
    image_size: int
    gemm_gflops: dict[str, float]
    results: list[Result]
    ratios: list[Ratio]


@dataclass
class Report:
    """What `benchmark` found.

    Attributes:
        weights: "random" where the model has none in the package.
        machine: Processor, threads, versions.
        calibration: Which images were taken for it, and how many; empty without it.
    """

    model: str
    weights: str
    machine: dict[str, Any]
    rounds: int
    seconds: float
    cases: list[Case]
    calibration: str = ""


@dataclass
class _Candidate:
    """What is timed: a name, a precision, how to make the callable, and, once made, the callable and its times."""

    name: str
    dtype: str
    make: Callable[[], tuple[Callable[[], Any], str]]
    result: Result = field(init=False)
    call: Callable[[], Any] | None = None
    rounds: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.result = Result(self.name, self.dtype)


def benchmark(
    model: str = "convmixer_256_8",
    *,
    batch_sizes: Sequence[int] = (1, 64),
    image_sizes: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    peers: bool = True,
    calibration: str | Path | None = None,
    device: str = "auto",
    checkpoint: str | Path | None = None,
    rounds: int = 7,
    seconds: float = 0.3,
    report: Callable[[str], None] = print,
) -> Report:
    """Time a model, optimized in all ways that work here, and timm's, at each batch and image size.

    Args:
        model: Any name of `create_model`, the folder of a finished run of `convmixer train`, or a .safetensors file.
            Weights of a name are loaded if they ship with the package, or from `checkpoint`; otherwise they are
            random, which costs the same time.
        batch_sizes: Images per call.
        image_sizes: Sides of square images; None: the model's own.
        backends: Of `optimize`; None: all.
        dtypes: Of "float32", "bfloat16" and "int8"; int8 needs `calibration`.
        peers: Also timm's `ConvMixer` with the same weights: eager, in channels_last, compiled, in ONNX Runtime and in
            OpenVINO.
        calibration: Training images for int8, as `optimize` takes them; then all are timed with these, not with noise.
        device: As in `create_model`.
        rounds: Rounds of a case.
        seconds: Least time of a candidate in a round.
        report: Takes lines about progress.

    Raises:
        ArgumentError: An argument that makes no sense. A candidate that fails is no error: its `failure` says why.
    """
    chosen = tuple(backends) if backends is not None else BACKENDS[1:]
    for what, values, valid in (("backend", chosen, BACKENDS[1:]), ("dtype", dtypes, tuple(DTYPES))):
        for value in values:
            if value not in valid:
                raise ArgumentError(f"unknown {what} {value!r}; valid: {', '.join(valid)}")
    numbers = {"batch_sizes": batch_sizes, "image_sizes": image_sizes or (1,), "rounds": (rounds,)}
    for what, sizes in numbers.items():
        if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ArgumentError(f"{what}={list(sizes)}: give whole numbers of at least 1")
    if seconds <= 0:
        raise ArgumentError(f"seconds={seconds}: give a time above 0")
    if "int8" in dtypes and calibration is None:
        raise ArgumentError("int8 needs calibration, training images by which its ranges are set: --calibration FOLDER")
    target = resolve_device(device)
    if backends is None and target.type == "cpu":
        chosen = tuple(backend for backend in chosen if backend != "triton")
    opened, weights = _open(model, target, checkpoint)
    config: dict[str, Any] = opened.pretrained_cfg
    sides = tuple(image_sizes) if image_sizes else (config["input_size"][1],)
    taken: list[str] = []
    photographs = None if calibration is None else calibration_images(calibration, opened, report=taken.append)
    cases = []
    for side in sides:
        for batch in batch_sizes:
            images = _images(opened, batch, side, photographs).to(target)
            candidates = _ours(opened, images, chosen, dtypes, photographs)
            if peers:
                candidates += _peers(opened, images, dtypes)
            cases.append(_case(opened, images, candidates, rounds, seconds, report))
    return Report(model, weights, _machine(target), rounds, seconds, cases, "".join(taken))


def _open(name: str, device: torch.device, checkpoint: str | Path | None) -> tuple[Any, str]:
    here = ":" in name or os.path.exists(name)
    if checkpoint or here or ((weights := get_variant(name)[1]) is not None and weights.path is not None):
        return open_model(name, checkpoint=checkpoint, device=device).eval(), str(checkpoint or name)
    torch.manual_seed(0)
    return create_model(name, device=device).eval(), "random"


def _images(model: Any, batch: int, side: int, photographs: Tensor | None) -> Tensor:
    """Random ones, or calibration images again and again: int8's ranges do not hold for noise."""
    if photographs is None:
        return torch.randn(batch, model.in_chans, side, side, generator=torch.Generator().manual_seed(0))
    images = photographs.repeat(-(-batch // len(photographs)), 1, 1, 1)[:batch]
    return images if images.shape[2:] == (side, side) else F.interpolate(images, (side, side))


def _machine(device: torch.device) -> dict[str, Any]:
    libraries = ("convmixer", "torch", "timm", "openvino", "onnxruntime", "nncf")
    versions: dict[str, str | None] = {}
    for library in libraries:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {"device": device_name(device), "threads": torch.get_num_threads(), "system": platform.platform()} | versions


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = cpu_name(), set(cpu_field("flags").split())
    if device.type != "cpu":
        return f"{device.type} of {name}"
    known = {"AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX-bf16": "amx_bf16", "AMX-int8": "amx_int8"}
    there = [label for label, flag in known.items() if flag in flags]
    return f"{name} with {', '.join(there)}" if there else name


# ---- candidates -----------------------------------------------------------------------------------------------------


def _ours(
    model: Any, images: Tensor, backends: Sequence[str], dtypes: Sequence[str], photographs: Tensor | None
) -> list[_Candidate]:
    def plain(dtype: str) -> Callable[[], tuple[Callable[[], Any], str]]:
        def make() -> tuple[Callable[[], Any], str]:
            cast = copy.deepcopy(model).to(DTYPES[dtype])
            inputs = images.to(DTYPES[dtype])
            return lambda: cast(inputs), ""

        return make

    def optimized(backend: str, dtype: str) -> Callable[[], tuple[Callable[[], Any], str]]:
        def make() -> tuple[Callable[[], Any], str]:
            if backend == "eager":
                folded = optimize(model, dtype=DTYPES[dtype])
                inputs = images.to(DTYPES[dtype])
                return lambda: folded(inputs), "the folded module"
            # Where a graph costs little, its pieces are chosen by trial; compiling takes too long for that.
            example = None if backend == "compile" else images
            images_for_int8 = photographs if dtype == "int8" else None
            fast = optimize(model, backend=backend, dtype=DTYPES[dtype], example=example, calibration=images_for_int8)
            return lambda: fast(images), str(fast.choice)

        return make

    found = []
    for dtype in dtypes:
        if dtype != "int8":
            found.append(_Candidate("convmixer unfolded", dtype, plain(dtype)))
        for backend in backends:
            if dtype == "int8" and backend not in ("native", "openvino"):
                continue
            if dtype != "float32" and backend == "onnxruntime":
                continue
            found.append(_Candidate(f"convmixer {backend}", dtype, optimized(backend, dtype)))
    return found


def timms(model: Any) -> nn.Module:
    """timm's own ConvMixer with the weights of ours, in evaluation mode."""
    from timm.models.convmixer import ConvMixer

    inner: Any = find_convmixer(model)
    act = type(inner.stem[1])
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


def _peers(model: Any, images: Tensor, dtypes: Sequence[str]) -> list[_Candidate]:
    """timm's model as its users would run it; OpenVINO both with one stream and with one for each core."""
    threads = torch.get_num_threads()

    def eager(dtype: torch.dtype, layout: torch.memory_format, compiled: bool = False) -> Any:
        def make() -> tuple[Callable[[], Any], str]:
            peer = timms(model).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
            inputs = images.to(dtype=dtype, memory_format=layout)
            run: Any = (Compiled if compiled else Whole)(peer)
            return lambda: run(inputs)[0], ""

        return make

    def openvino(dtype: torch.dtype, streams: int) -> Any:
        def make() -> tuple[Callable[[], Any], str]:
            share = -(-len(images) // streams)
            run = OpenVINO(to_openvino(timms(model)), dtype, threads, None if streams == 1 else lambda *_: share)
            return lambda: run(images)[0], ""

        return make

    def onnxruntime() -> tuple[Callable[[], Any], str]:
        run = OnnxRuntime(to_onnx(timms(model)), threads, None)
        return lambda: run(images)[0], ""

    found = []
    for name in dtypes:
        if name == "int8":
            continue
        dtype = DTYPES[name]
        found += [
            _Candidate("timm eager", name, eager(dtype, torch.contiguous_format)),
            _Candidate("timm channels_last", name, eager(dtype, torch.channels_last)),
            _Candidate("timm compile", name, eager(dtype, torch.channels_last, compiled=True)),
        ]
        if images.device.type == "cpu":
            if name == "float32":
                found.append(_Candidate("timm onnxruntime", name, onnxruntime))
            found.append(_Candidate("timm openvino", name, openvino(dtype, 1)))
            if 1 < threads <= len(images):
                found.append(_Candidate(f"timm openvino, {threads} streams", name, openvino(dtype, threads)))
    return found


def _gemm(dtype: str, device: torch.device) -> _Candidate:
    side = GEMM_SIDE if device.type == "cpu" else 4 * GEMM_SIDE

    def make() -> tuple[Callable[[], Any], str]:
        generator = torch.Generator().manual_seed(0)
        if dtype == "int8":
            a, b = (torch.randint(-9, 9, (side, side), generator=generator, dtype=torch.int8).to(device) for _ in "ab")
            return lambda: torch._int_mm(a, b), ""
        a, b = (torch.randn(side, side, generator=generator).to(device, DTYPES[dtype]) for _ in "ab")
        return lambda: a @ b, ""

    return _Candidate(f"gemm {side}", dtype, make)


# ---- timing ---------------------------------------------------------------------------------------------------------


def _time(call: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Seconds of each call, after one that is not counted, until they sum up to enough."""
    call()
    taken: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        repeats = 8
        while sum(taken) < seconds:
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
            ]
            for begin, end in events:
                begin.record()
                call()
                end.record()
            torch.cuda.synchronize(device)
            taken += [begin.elapsed_time(end) / 1000 for begin, end in events]
            repeats *= 2
        return taken
    total = 0.0
    while total < seconds:
        begun = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - begun)
        total += taken[-1]
    return taken


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Memory:
    """Growth of the peak of memory from the construction on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 2**20
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # lets the peak start anew
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> float:
        try:
            found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        except OSError:
            found = None
        return int(found[1]) / 1024 if found else float("nan")

    def growth(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        grown = self._status("VmHWM") - self.before
        return max(grown, 0.0) if grown == grown else None


def _prepare(candidate: _Candidate, reference: Tensor | None, device: torch.device) -> None:
    """Make it and call it once; what it answers is compared, what goes wrong is noted."""
    result, memory = candidate.result, _Memory(device)
    try:
        call, result.choice = candidate.make()
        answer = call()
        _wait(device)
        result.peak_memory_mib = memory.growth()
        if reference is not None:
            got = answer.detach()[: len(reference)].cpu().double()
            result.relative_error = float((got - reference).norm() / reference.norm())
        candidate.call = call
    except ConvMixerError as error:
        result.failure = str(error)
    except Exception as error:  # of any library; the others go on
        result.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@torch.inference_mode()
def _reference(model: Any, images: Tensor) -> Tensor:
    """Logits of some images in float64, on the CPU because not every device has that type."""
    result: Tensor = copy.deepcopy(model).to("cpu", torch.float64)(images[:REFERENCE_IMAGES].cpu().double())
    return result


def _case(
    model: Any,
    images: Tensor,
    candidates: list[_Candidate],
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> Case:
    device, batch = images.device, len(images)
    where = f"batch {batch} at {images.shape[3]} pixels"
    products = {dtype: _gemm(dtype, device) for dtype in dict.fromkeys(c.dtype for c in candidates)}
    with torch.no_grad():
        reference = _reference(model, images)
        for candidate in candidates:
            report(f"{where}: preparing {candidate.name} {candidate.dtype}")
            _prepare(candidate, reference, device)
        for product in products.values():
            _prepare(product, None, device)
        everyone = [c for c in [*products.values(), *candidates] if c.call is not None]
        for turn in range(rounds):
            report(f"{where}: round {turn + 1} of {rounds}")
            first = turn % len(everyone)
            for candidate in everyone[first:] + everyone[:first]:
                try:
                    candidate.rounds.append(_time(candidate.call, seconds, device))  # type: ignore[arg-type]
                except Exception as error:
                    candidate.call, candidate.result.failure = None, f"{type(error).__name__}: {error}"
                    everyone.remove(candidate)
    gemm = {}
    for dtype, product in products.items():
        side = int(product.name.split()[1])
        if product.call is not None:
            gemm[dtype] = [2 * side**3 / min(times) for times in product.rounds]
    work = 2 * macs(model, *images.shape[2:]) * batch
    for candidate in candidates:
        if candidate.call is not None:
            _summarise(candidate, batch, work, gemm.get(candidate.dtype))
    return Case(
        batch_size=batch,
        image_size=images.shape[3],
        gemm_gflops={dtype: statistics.median(values) / 1e9 for dtype, values in gemm.items()},
        results=[candidate.result for candidate in candidates],
        ratios=_ratios([c for c in candidates if c.call is not None]),
    )


def macs(model: Any, height: int, width: int) -> int:
    """Multiply-accumulates of one image of that size, depthwise convolutions counted."""
    inner: Any = find_convmixer(model)
    positions = (height // inner.patch_size) * (width // inner.patch_size)
    convolutions = [m for m in inner.modules() if isinstance(m, nn.Conv2d)]
    total: int = positions * sum(m.weight.numel() for m in convolutions) + inner.dim * inner.num_classes
    return total


def _speeds(candidate: _Candidate) -> list[float]:
    """Calls per second, by round."""
    return [len(times) / sum(times) for times in candidate.rounds]


def _summarise(candidate: _Candidate, batch: int, work: float, gemm: list[float] | None) -> None:
    result, speeds = candidate.result, _speeds(candidate)
    result.images_per_second = batch * statistics.median(speeds)
    result.slowest, result.fastest = batch * min(speeds), batch * max(speeds)
    calls = torch.tensor([1000 * t for times in candidate.rounds for t in times], dtype=torch.float64)
    result.calls = len(calls)
    shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    result.latency_ms = dict(zip(("p50", "p90", "p99"), calls.quantile(shares).tolist(), strict=True))
    if gemm:
        result.ceiling_share = statistics.median(work * s / g for s, g in zip(speeds, gemm, strict=True))


def _ratios(candidates: list[_Candidate]) -> list[Ratio]:
    ratios = []
    for dtype in dict.fromkeys(c.dtype for c in candidates):
        sides: list[list[_Candidate]] = [
            [c for c in candidates if c.dtype == dtype and c.name.startswith(side)] for side in ("convmixer", "timm")
        ]
        if dtype == "int8":  # against our own bfloat16
            sides[1] = [c for c in candidates if c.dtype == "bfloat16" and c.name.startswith("convmixer")]
        if all(sides):
            ours, peer = (max(side, key=lambda c: statistics.median(_speeds(c))) for side in sides)
            by_round = [a / b for a, b in zip(_speeds(ours), _speeds(peer), strict=True)]
            middle = statistics.median(by_round)
            ratios.append(Ratio(dtype, ours.name, f"{peer.name} {peer.dtype}", middle, min(by_round), max(by_round)))
    return ratios
