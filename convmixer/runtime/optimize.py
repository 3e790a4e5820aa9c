"""`optimize`: the folded model, in the runtime, precision and pieces that suit the machine.

A runtime is a callable from images (B, C, H, W) to a list of outputs. It cuts a batch into pieces, for one reason: what
a block reads and writes should stay in the cache of the core that computes it. Graphs are compiled for one shape each,
when that shape comes first, and kept; all runtimes may be called from several threads. Copied, pickled or sent to
another process, a runtime is made anew from what it was made of.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.errors import ArgumentError, DependencyError
from convmixer.hardware import bf16_is_faster, has_tiles, l2_cache
from convmixer.model import as_dtype, check_dtype
from convmixer.native import library as native
from convmixer.ops import prefers_channels_last
from convmixer.ops.dispatch import KERNEL_SIZES
from convmixer.ops.fused import ACTIVATIONS
from convmixer.runtime.choose import BACKENDS, Choice, _missing, _require, _unsupported, available_backends
from convmixer.runtime.chunks import Rule, _Fitting, _Fixed, _Small, _Together
from convmixer.runtime.compile import Compiled
from convmixer.runtime.convert import to_onnx, to_openvino
from convmixer.runtime.cuda_graphs import Replayed
from convmixer.runtime.eager import Whole
from convmixer.runtime.folding import FoldedConvMixer, find_convmixer, fold
from convmixer.runtime.onnxruntime import OnnxRuntime
from convmixer.runtime.openvino import OpenVINO
from convmixer.runtime.optimized_model import OptimizedConvMixer
from convmixer.runtime.quantize import _check_int8, calibration_images, quantize
from convmixer.runtime.triton import Triton
from convmixer.tracing import computing
from convmixer.wrappers import find_inner, unwrap

GRAPH_BYTES = 2**25  # of a feature map, above which launches on a GPU cost little and memory much


NATIVE_DIM = 512  # above it OpenVINO is faster where there is no AMX: measured with 256 and 768 channels


_LOGGER = logging.getLogger(__name__)


def optimize(
    model: nn.Module,
    *,
    normalization: bool = False,
    dtype: torch.dtype | str | None = None,
    backend: str = "eager",
    chunk: int | None = None,
    threads: int | None = None,
    calibration: Tensor | str | Path | None = None,
    example: Tensor | None = None,
    graphs: bool | Literal["auto"] = "auto",
) -> Any:
    """A copy of a ConvMixer for inference with equal outputs and without BatchNorm. The original stays as it is.

    The weights are folded in float64 and rounded once, so in the same type the copy differs from the original in
    evaluation mode by rounding alone, at every image size.

    With `backend="eager"` the copy is a plain PyTorch module, which `torch.export`, `torch.compile` and the ONNX
    exporter take. The other backends run it in a compiled form; what they chose is in the attribute `choice` and in the
    log of `convmixer.runtime.optimize`.

    Args:
        model: A `ConvMixer`, whole or truncated, or what `create_model(features_only=True)` returns; also inside
            `torch.compile`, DataParallel, DistributedDataParallel, or an average of weights.
        normalization: Fold mean and std of the model's `pretrained_cfg` into the first convolution, too: the copy takes
            images with values in [0, 1], and its `pretrained_cfg` says mean 0 and std 1, as `predict` and
            `create_transform` need it.
        dtype: Type to compute in, such as `torch.bfloat16` or "bfloat16"; None keeps the model's. "auto" takes
            bfloat16 where the hardware has products for it, else float32. `torch.int8` quantises the convolutions and
            computes the rest in the type of "auto"; it needs `calibration` and `backend` "native", "openvino" or
            "auto".
        backend: "eager"; "compile" (TorchInductor); on CPUs "openvino", "onnxruntime" and "native" (own kernels, for
            x86 with AVX-512); on CUDA devices "triton" (own kernels); or "auto": by rule the usually fastest of those
            that work here, or by measurement if there is an `example`.
        chunk: Most images to compute at a time by one thread ("compile" on a CPU: times its threads); larger batches
            are cut up. None: on CPUs as many as fill a core's second-level cache. "native" takes single images.
        threads: Of "openvino", "onnxruntime" and "native"; None: as many as PyTorch uses.
        calibration: For int8: images as the model takes them (N, C, H, W), or a folder, a tar or a name such as
            `torch/cifar10`, of which at most 512 training images are taken. Never give test images.
        example: Images (B, C, H, W) as the model will get them: backends and chunks that come into question are timed
            with it, and the fastest is taken. It takes seconds, with "compile" among them minutes.
        graphs: On a CUDA device, replay calls as CUDA graphs, one for each shape that comes a second time: for few or
            small images, whose kernels take the GPU less time than launching them takes the host. At most eight graphs
            are kept. "auto" does so for every backend but "eager", where feature maps are at most 32 MiB; True for
            feature maps of any size, at the cost of their memory.

    Returns:
        A `FoldedConvMixer` with "eager" (for a feature extractor timm's `FeatureGetterNet` around one), otherwise an
        `OptimizedConvMixer`.

    Raises:
        ArgumentError: Another kind of module; a type or a device that the backend cannot compute; `normalization` for a
            model that says nothing about its preprocessing; arguments that do not go together.
        DependencyError: A backend that is not installed; the message says how to get it.
    """
    if backend not in BACKENDS:
        raise ArgumentError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    for name, value in {"chunk": chunk, "threads": threads}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ArgumentError(f"{name}={value!r}: give a whole number of at least 1, or None")
    model = unwrap(model)
    weight: Any = find_convmixer(model).stem[0].weight
    dtype = as_dtype(dtype)
    if dtype == "auto":
        kind = torch.bfloat16 if bf16_is_faster(weight.device) else torch.float32
    elif dtype is None:
        kind = weight.dtype
    elif isinstance(dtype, torch.dtype):
        kind = dtype
    else:
        raise ArgumentError(f"dtype={dtype!r}: give a floating point type such as 'bfloat16', 'int8', or 'auto'")
    candidates, reason = _candidates(backend, model, weight.device, kind)
    if kind != torch.int8:
        check_dtype(kind)
    if (kind == torch.int8) != (calibration is not None):
        what = "dtype=torch.int8 needs images" if calibration is None else "calibration is for dtype=torch.int8 alone"
        raise ArgumentError(f"{what}: give both, calibration being training images or a folder of them")
    if not (isinstance(graphs, bool) or graphs == "auto"):
        raise ArgumentError(f"graphs={graphs!r}; valid: True, False, 'auto'")
    if graphs is True and (weight.device.type != "cuda" or backend == "eager"):
        raise ArgumentError(
            f"graphs=True is for CUDA devices and backends other than 'eager', not for {backend!r} on {weight.device}: "
            "leave it out"
        )
    if backend == "eager":
        if chunk is not None or threads is not None or example is not None:
            raise ArgumentError("chunk, threads and example need a backend other than 'eager', such as 'auto'")
        return fold(model, normalization, kind)
    if backend == "native" and chunk is not None:
        raise ArgumentError(f"chunk={chunk}: native computes single images; leave it out")
    maker = _Maker(model, normalization, kind, threads or torch.get_num_threads(), calibration, graphs)
    optimized = maker.first(candidates, chunk, reason) if example is None else maker.best(candidates, chunk, example)
    _LOGGER.info("%s", optimized.choice)
    return optimized


def _candidates(
    backend: str, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[str, ...], str]:
    """The backends that come into question, best first by rule, and why the first one is."""
    if backend != "auto":
        unsupported = _unsupported(backend, device, dtype) or _refusal(backend, model, dtype)
        if unsupported:
            raise ArgumentError(unsupported)
        _require(backend, device, dtype)
        return (backend,), "as asked"
    found = tuple(b for b in available_backends(device, dtype) if not _refusal(b, model, dtype))
    if not found:  # int8 alone, which openvino computes everywhere
        return _candidates("openvino", model, device, dtype)
    if "openvino" in found and find_convmixer(model).dim > NATIVE_DIM and not has_tiles():
        found = ("openvino", *(b for b in found if b != "openvino"))
    absent = [
        m
        for b in ("native", "openvino", "compile", "onnxruntime")
        if not _unsupported(b, device, dtype) and b not in found and (m := _missing(b, device, dtype))
    ]
    reason = f"by rule the fastest of {', '.join(found)} for {_name(dtype)} on {device.type}"
    return found, "; ".join([reason, *absent])


def _refusal(backend: str, model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the backend does not take this model; None if it does."""
    if backend not in ("native", "triton"):
        return None
    if isinstance(model, FeatureGetterNet):
        other = "openvino" if backend == "native" else "compile"
        return f"{backend} returns the last output alone: use another backend for features_only, such as {other}"
    inner = find_convmixer(model)
    if backend == "native":
        return native.refusal(inner, dtype)
    block: Any = inner.blocks[0]
    depthwise, act, _ = block[0].fn
    if depthwise.kernel_size[0] not in KERNEL_SIZES:
        valid = f"{KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
        return f"triton computes kernels of {valid}, this model has {depthwise.kernel_size[0]}: use compile"
    if type(act) not in ACTIVATIONS or getattr(act, "approximate", "none") != "none":
        return f"triton computes {', '.join(ACTIVATIONS.values())}, this model has {act}: use compile"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Maker:
    """Makes optimized models of one model for several backends and chunks; what they can share is made once."""

    def __init__(
        self,
        model: nn.Module,
        normalization: bool,
        dtype: torch.dtype,
        threads: int,
        calibration: Tensor | str | Path | None,
        graphs: bool | Literal["auto"],
    ) -> None:
        self.graphs = graphs
        self.model, self.normalization, self.dtype, self.threads = model, normalization, dtype, threads
        inner: Any = find_convmixer(model)
        self.kernel_size: int = inner.blocks[0][0].fn[0].kernel_size[0]
        self.device: torch.device = inner.stem[0].weight.device
        self.calibration = calibration
        self.rest = dtype  # beside the quantised products
        if dtype == torch.int8:
            self.rest = torch.bfloat16 if bf16_is_faster(self.device) else torch.float32
        self.rule = _Fitting(inner.dim, inner.patch_size, self.rest.itemsize)
        self._sources: dict[str, tuple[nn.Module, Any]] = {}

    def first(self, backends: Sequence[str], chunk: int | None, reason: str) -> OptimizedConvMixer:
        """In the first backend that can be made; why others cannot is added to the reason."""
        for backend in backends[:-1]:
            try:
                if backend == "compile":  # otherwise its first call would tell, when nothing else can be taken
                    self.try_compiler()
                return self(backend, chunk, reason)
            except DependencyError as error:
                reason += f"; {error}"
                _LOGGER.warning("backend='auto' goes on without %s: %s", backend, error)
        return self(backends[-1], chunk, reason)

    def try_compiler(self) -> None:
        """Compile one small layer; a DependencyError if TorchInductor cannot."""
        layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GELU()).to(self.device).eval()
        Compiled(layers)(torch.zeros(1, 1, 8, 8, device=self.device))

    def best(self, backends: Sequence[str], chunk: int | None, example: Tensor) -> OptimizedConvMixer:
        """In the backend and the pieces that are fastest for the example; why others cannot be made is said, too."""
        models, failures = [], ""
        for backend in backends:
            for size in (None,) if backend == "native" else (chunk,) if chunk else self.chunks(example):
                try:
                    made = self(backend, size, "")
                    made(example)  # what compiles does it now
                    models.append(made)
                except DependencyError as error:
                    if len(backends) == 1:
                        raise
                    failures += f"; {error}"
                    break
        return _fastest(models, example, failures)

    def chunks(self, example: Tensor) -> tuple[int, ...]:
        """Chunks worth a trial: around the rule's, and none."""
        if self.device.type != "cpu":
            return (len(example),)
        best = self.rule(*example.shape[2:])
        share = -(-len(example) // self.threads)
        return tuple(sorted({min(c, share) for c in (max(best // 2, 1), best, 2 * best, share)}))

    def _source(self, backend: str) -> tuple[nn.Module, Any]:
        """The folded module, and what the backend makes of it."""
        if backend not in self._sources:
            if backend in ("eager", "compile", "triton"):
                folded = fold(self.model, self.normalization, self.dtype)
                find_inner(folded).channels_last = prefers_channels_last(self.device, self.dtype, self.kernel_size)
                self._sources[backend] = folded, None
            else:
                # float16 ends early, which decides what may be folded
                limited = self.dtype == torch.float16
                precision = torch.float16 if limited else torch.float32
                folded = fold(self.model, self.normalization, precision, divide=self.dtype != torch.int8).float()
                make = self._int8 if self.dtype == torch.int8 else self._made
                self._sources[backend] = folded, make(backend, folded)
        return self._sources[backend]

    def _made(self, backend: str, folded: FoldedConvMixer) -> Any:
        if backend == "native":
            return native.Native(folded, self.dtype, self.threads)
        return to_openvino(folded) if backend == "openvino" else to_onnx(folded)

    def _int8(self, backend: str, folded: FoldedConvMixer) -> Any:
        images = calibration_images(self.calibration, folded)
        if backend == "native":
            with computing():
                ranges = native.calibrate(folded, images)
            runtime = native.NativeInt8(folded, ranges, self.threads)
            _check_int8(runtime, folded, images[:64].float())
            return runtime
        quantized = quantize(to_openvino(folded), images)
        _check_int8(OpenVINO(quantized, self.rest, self.threads, None), folded, images[:64].float())
        return quantized

    def __call__(self, backend: str, chunk: int | None, reason: str) -> OptimizedConvMixer:
        folded, source = self._source(backend)
        on_cpu = self.device.type == "cpu"
        rule: Rule | None = _Fixed(chunk) if chunk else self.rule if on_cpu else None
        runtime: Any
        if backend == "openvino":
            runtime = OpenVINO(source, self.rest, self.threads, rule)
        elif backend == "onnxruntime":
            runtime = OnnxRuntime(source, self.threads, rule)
        elif backend == "native":
            runtime = source
        else:
            together = _Together(rule) if rule and on_cpu else rule
            runtime = {"eager": Whole, "compile": Compiled, "triton": Triton}[backend](folded, together)
            if self.graphs and self.device.type == "cuda":
                inner = find_inner(folded)
                most = sys.maxsize if self.graphs is True else GRAPH_BYTES
                runtime = Replayed(runtime, _Small(inner.num_features, inner.patch_size, most))
        layout = "channels_last" if backend == "triton" else "own"
        if backend in ("eager", "compile"):
            layout = "channels_last" if find_inner(folded).channels_last else "contiguous"
        kind = f"int8 and {_name(self.rest)}" if self.dtype == torch.int8 else _name(self.dtype)
        fitting = f"pieces that fill {l2_cache() // 1024:,} KiB of cache" if on_cpu else "whole batches"
        times = torch.get_num_threads() if on_cpu and backend in ("eager", "compile") else 1  # of `_Together`
        cut = f"pieces of at most {chunk * times} images" if chunk else fitting
        if backend == "native":
            layout, cut = "contiguous" if source.planar else "channels_last", "single images"
        choice = Choice(
            backend=backend,
            dtype=kind,
            device=str(self.device),
            layout=layout,
            threads=self.threads if source is not None else torch.get_num_threads() if on_cpu else 0,
            pieces=cut,
            reason=reason,
        )
        return OptimizedConvMixer(folded, runtime, choice)


def _fastest(models: Sequence[OptimizedConvMixer], example: Tensor, failures: str) -> OptimizedConvMixer:
    """The one with the shortest median time for the example, of rounds in which they take turns."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(6):
        for model, times in zip(models, seconds, strict=True):
            begun = time.perf_counter()
            model(example)
            if example.is_cuda:
                torch.cuda.synchronize()
            if turn:  # after one to warm up
                times.append(time.perf_counter() - begun)
    medians = [statistics.median(times) for times in seconds]
    ranked = sorted(range(len(models)), key=medians.__getitem__)
    shown = ", ".join(
        f"{models[i].choice.backend} in {models[i].choice.pieces} {1000 * medians[i]:.2f} ms" for i in ranked
    )
    best = models[ranked[0]]
    best.choice = replace(best.choice, reason=f"fastest for {tuple(example.shape)}: {shown}{failures}")
    return best
