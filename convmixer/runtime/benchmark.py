"""Compare the speed of a model in all its forms in one process: ours and timm's, by backend and precision.

All candidates of a case take turns, round after round, so that what disturbs the machine disturbs all of them. A round
gives each candidate at least a set time, after one call that is not timed. Ratios are computed within rounds. The
ceiling is the multiplication of two square matrices by PyTorch, timed in the same rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError, is_count
from convmixer.factory import create_model, open_model, resolve_device
from convmixer.hardware import cpu_field, cpu_name
from convmixer.registry import get_variant
from convmixer.runtime.benchmark_cases import DTYPES, Call, Candidate, gemm, gemm_side, our_candidates, timm_candidates
from convmixer.runtime.choose import BACKENDS
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.quantize import calibration_images
from convmixer.runtime.timing import PeakMemory, time_calls, wait
from convmixer.wrappers import copy_module

REFERENCE_IMAGES = 4  # of each batch that are computed in float64


@dataclass
class Result:
    """What was measured of one candidate.

    Attributes:
        name: Such as "convmixer openvino".
        dtype: What it computes in.
        images_per_second: Median over rounds; None if it failed.
        slowest, fastest: The slowest and the fastest round, in images per second.
        latency_ms: Time of one call in milliseconds: "p50", "p90", "p99" over all calls.
        calls: Number of timed calls.
        peak_memory_mib: Memory that building it and its first call took, above what the process held before: GPU
            memory on a GPU, resident memory on Linux, else None.
        relative_error: Of the logits against the original model in float64: norm of the difference by norm.
        ceiling_share: Floating point operations per second, divided by those of the matrix multiplication in the same
            precision.
        choice: What `optimize` chose, in words.
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
        gemm_gflops: Speed of the matrix multiplication, by precision: median over rounds.
    """

    batch_size: int
    image_size: int | str
    gemm_gflops: dict[str, float]
    results: list[Result]
    ratios: list[Ratio]


@dataclass
class Report:
    """The results of `benchmark`.

    Attributes:
        weights: "random" where the model has none in the package.
        machine: Processor, threads, versions.
        calibration: Which calibration images were taken, and how many; empty if none were.
    """

    model: str
    weights: str
    machine: dict[str, Any]
    rounds: int
    seconds: float
    cases: list[Case]
    calibration: str = ""


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
    """Time a model, in every backend that works here, and timm's, at each batch and image size.

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
        calibration: Training images for int8, as `optimize` takes them; all candidates are then timed with these,
            not with noise.
        device: As in `create_model`.
        rounds: Rounds of a case.
        seconds: Least time of a candidate in a round.
        report: Takes lines about progress.

    Raises:
        ArgumentError: An invalid argument. A candidate that fails raises nothing: its `failure` says why.

    Example:
        >>> from convmixer.runtime.benchmark import benchmark
        >>> report = benchmark(
        ...     batch_sizes=(1,), backends=("eager",), dtypes=("float32",), peers=False,
        ...     device="cpu", rounds=2, seconds=0.01, report=lambda line: None,
        ... )
        >>> report.cases[0].results[0].failure
        ''
    """
    _check_arguments(backends, dtypes, batch_sizes, image_sizes, rounds, seconds, calibration)
    target = resolve_device(device)
    asked = backends is not None
    if backends is None:
        backends = [name for name in BACKENDS[1:] if name != "triton" or target.type != "cpu"]
    backends, dtypes = (list(dict.fromkeys(names)) for names in (backends, dtypes))
    opened, weights = _open(model, target, checkpoint)
    sizes = [(side, side) for side in image_sizes or ()] or [tuple(opened.pretrained_cfg["input_size"][1:])]
    taken: list[str] = []
    photographs = None if calibration is None else calibration_images(calibration, opened, report=taken.append)
    cases = []
    for size in sizes:
        for batch in batch_sizes:
            images = _images(opened, batch, size, photographs).to(target)
            candidates = our_candidates(opened, images, backends, dtypes, photographs, asked=asked)
            if peers:
                candidates += timm_candidates(opened, images, dtypes)
            cases.append(_case(opened, images, candidates, rounds, seconds, report))
    return Report(model, weights, _machine(target), rounds, seconds, cases, "".join(taken))


def _check_arguments(
    backends: Sequence[str] | None,
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    image_sizes: Sequence[int] | None,
    rounds: int,
    seconds: float,
    calibration: str | Path | None,
) -> None:
    for what, values, valid in (("backend", backends or (), BACKENDS[1:]), ("dtype", dtypes, tuple(DTYPES))):
        for value in values:
            if value not in valid:
                raise ArgumentError(f"unknown {what} {value!r}; valid: {', '.join(valid)}")
    numbers = {"batch_sizes": batch_sizes, "image_sizes": image_sizes or (1,), "rounds": (rounds,)}
    for what, sizes in numbers.items():
        if not sizes or not all(map(is_count, sizes)):
            raise ArgumentError(f"{what}={list(sizes)}: give whole numbers of at least 1")
    if seconds <= 0:
        raise ArgumentError(f"seconds={seconds}: give a time above 0")
    if "int8" in dtypes and calibration is None:
        raise ArgumentError("int8 needs calibration, training images by which its ranges are set: --calibration FOLDER")


def _open(name: str, device: torch.device, checkpoint: str | Path | None) -> tuple[Any, str]:
    here = ":" in name or os.path.exists(name)
    if checkpoint or here or ((weights := get_variant(name)[1]) is not None and weights.path is not None):
        return open_model(name, checkpoint=checkpoint, device=device).eval(), str(checkpoint or name)
    torch.manual_seed(0)
    return create_model(name, device=device).eval(), "random"


def _images(model: Any, batch: int, size: tuple[int, ...], photographs: Tensor | None) -> Tensor:
    """Return random images, or repeated calibration images: int8's ranges do not hold for noise."""
    if photographs is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, model.in_chans, *size, generator=generator, dtype=torch.float32)
    images = photographs.repeat(-(-batch // len(photographs)), 1, 1, 1)[:batch]
    return images if images.shape[2:] == size else F.interpolate(images, size)


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
    """Return the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = cpu_name(), set(cpu_field("flags").split())
    if device.type != "cpu":
        return f"{device.type} of {name}"
    known = {"AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX-bf16": "amx_bf16", "AMX-int8": "amx_int8"}
    there = [label for label, flag in known.items() if flag in flags]
    return f"{name} with {', '.join(there)}" if there else name


# ---- one case -------------------------------------------------------------------------------------------------------


@dataclass
class _Contender:
    """A candidate, the call that it made, unless that failed, and the seconds of each call by round."""

    candidate: Candidate
    result: Result = field(init=False)
    call: Call | None = None
    rounds: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.result = Result(self.candidate.name, self.candidate.dtype)

    def prepare(self, device: torch.device, reference: Tensor | None) -> None:
        """Make the call and call it once; compare what it returns, and note a failure."""
        memory = PeakMemory(device)
        try:
            call, self.result.choice = self.candidate.make()
            answer = call()
            wait(device)
            self.result.peak_memory_mib = memory.growth()
            if reference is not None:
                got = answer.detach()[: len(reference)].cpu().double()
                self.result.relative_error = float((got - reference).norm() / reference.norm())
            self.call = call
        except ConvMixerError as error:
            self.result.failure = str(error)
        except Exception as error:  # of any library; the others go on
            self.result.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def run(self, seconds: float, device: torch.device) -> None:
        """Time one round, or note a failure."""
        try:
            self.rounds.append(time_calls(self.call, seconds, device))  # type: ignore[arg-type]
        except Exception as error:
            self.call, self.result.failure = None, f"{type(error).__name__}: {error}"

    def speeds(self) -> list[float]:
        """Return the calls per second, by round."""
        return [len(times) / sum(times) for times in self.rounds]

    def summarize(self, batch: int, work: float, gemm_speeds: list[float] | None) -> None:
        """Fill in the result; `work` is the floating point operations of a call."""
        result, speeds = self.result, self.speeds()
        result.images_per_second = batch * statistics.median(speeds)
        result.slowest, result.fastest = batch * min(speeds), batch * max(speeds)
        calls = torch.tensor([1000 * t for times in self.rounds for t in times], dtype=torch.float64)
        result.calls = len(calls)
        shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
        result.latency_ms = dict(zip(("p50", "p90", "p99"), calls.quantile(shares).tolist(), strict=True))
        if gemm_speeds:
            result.ceiling_share = statistics.median(work * s / g for s, g in zip(speeds, gemm_speeds, strict=True))


@torch.inference_mode()
def _reference(model: Any, images: Tensor) -> Tensor:
    """Return logits of some images in float64, on the CPU because not every device has that type."""
    result: Tensor = copy_module(model).to("cpu", torch.float64)(images[:REFERENCE_IMAGES].cpu().double())
    return result


def _case(
    model: Any,
    images: Tensor,
    candidates: list[Candidate],
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> Case:
    device, batch = images.device, len(images)
    height, width = images.shape[2:]
    size = width if height == width else f"{height}x{width}"
    title = f"batch {batch} at {size} pixels"
    contenders = [_Contender(candidate) for candidate in candidates]
    gemms = {dtype: _Contender(gemm(dtype, device)) for dtype in dict.fromkeys(c.dtype for c in candidates)}
    with torch.no_grad():
        reference = _reference(model, images)
        for contender in contenders:
            report(f"{title}: preparing {contender.result.name} {contender.result.dtype}")
            contender.prepare(device, reference)
        for contender in gemms.values():
            contender.prepare(device, None)
        running = [c for c in [*gemms.values(), *contenders] if c.call is not None]
        for turn in range(rounds):
            report(f"{title}: round {turn + 1} of {rounds}")
            first = turn % max(len(running), 1)  # each round another one begins
            for contender in running[first:] + running[:first]:
                contender.run(seconds, device)
            running = [contender for contender in running if contender.call is not None]
    operations = 2 * gemm_side(device) ** 3
    ceilings = {d: [operations / min(times) for times in c.rounds] for d, c in gemms.items() if c.call is not None}
    work = 2 * macs(model, *images.shape[2:]) * batch
    timed = [contender for contender in contenders if contender.call is not None]
    for contender in timed:
        contender.summarize(batch, work, ceilings.get(contender.result.dtype))
    return Case(
        batch_size=batch,
        image_size=size,
        gemm_gflops={dtype: statistics.median(values) / 1e9 for dtype, values in ceilings.items()},
        results=[contender.result for contender in contenders],
        ratios=_ratios(timed),
    )


def macs(model: Any, height: int, width: int) -> int:
    """Return the multiply-accumulates of one image of that size, including depthwise convolutions."""
    inner: Any = find_convmixer(model)
    positions = (height // inner.patch_size) * (width // inner.patch_size)
    convolutions = [m for m in inner.modules() if isinstance(m, nn.Conv2d)]
    total: int = positions * sum(m.weight.numel() for m in convolutions) + inner.head_hidden_size * inner.num_classes
    return total


def _ratios(timed: list[_Contender]) -> list[Ratio]:
    """Compare the fastest of ours with timm's, in each type; in int8 with our own in bfloat16."""
    ratios = []
    for dtype in dict.fromkeys(contender.result.dtype for contender in timed):
        ours = _of(timed, "convmixer", dtype)
        peers = _of(timed, "convmixer", "bfloat16") if dtype == "int8" else _of(timed, "timm", dtype)
        if ours and peers:
            best, peer = (max(side, key=lambda c: statistics.median(c.speeds())) for side in (ours, peers))
            by_round = [a / b for a, b in zip(best.speeds(), peer.speeds(), strict=True)]
            name, median = f"{peer.result.name} {peer.result.dtype}", statistics.median(by_round)
            ratios.append(Ratio(dtype, best.result.name, name, median, min(by_round), max(by_round)))
    return ratios


def _of(contenders: list[_Contender], package: str, dtype: str) -> list[_Contender]:
    """Return the contenders of "convmixer" or "timm" in a type."""
    return [c for c in contenders if c.result.dtype == dtype and c.result.name.startswith(package)]
