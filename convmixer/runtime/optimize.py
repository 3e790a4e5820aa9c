"""`optimize`: a folded copy of a model, in the backend, precision and chunk size that suit the machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, overload

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.errors import ArgumentError, is_count
from convmixer.hardware import bf16_is_faster
from convmixer.model import ConvMixer, as_dtype, check_dtype, check_input
from convmixer.runtime.choose import candidates, check_backend, fastest, first_that_works
from convmixer.runtime.folding import FoldedConvMixer, check_layers, find_convmixer, fold
from convmixer.runtime.optimized_model import OptimizedConvMixer
from convmixer.runtime.protocol import Backend, Request
from convmixer.wrappers import describe, unwrap

_LOGGER = logging.getLogger(__name__)


@overload
def optimize(
    model: ConvMixer,
    *,
    normalization: bool = ...,
    dtype: torch.dtype | str | None = ...,
    backend: Literal["eager"] = ...,
) -> FoldedConvMixer: ...


@overload
def optimize(
    model: FeatureGetterNet,
    *,
    normalization: bool = ...,
    dtype: torch.dtype | str | None = ...,
    backend: Literal["eager"] = ...,
) -> FeatureGetterNet: ...


@overload
def optimize(
    model: nn.Module,
    *,
    normalization: bool = ...,
    dtype: torch.dtype | str | None = ...,
    backend: Literal["auto", "native", "openvino", "onnxruntime", "compile", "triton"],
    chunk: int | None = ...,
    threads: int | None = ...,
    calibration: Tensor | str | Path | None = ...,
    example: Tensor | None = ...,
    graphs: bool | Literal["auto"] = ...,
) -> OptimizedConvMixer: ...


@overload
def optimize(
    model: nn.Module,
    *,
    normalization: bool = ...,
    dtype: torch.dtype | str | None = ...,
    backend: str = ...,
    chunk: int | None = ...,
    threads: int | None = ...,
    calibration: Tensor | str | Path | None = ...,
    example: Tensor | None = ...,
    graphs: bool | Literal["auto"] = ...,
) -> FoldedConvMixer | FeatureGetterNet | OptimizedConvMixer: ...


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
) -> FoldedConvMixer | FeatureGetterNet | OptimizedConvMixer:
    """Return a copy of a ConvMixer for inference, with equal outputs and without BatchNorm. The original is unchanged.

    The weights are folded in float64 and rounded once. So in the same type the copy differs from the original in
    evaluation mode only by rounding, at every image size.

    With `backend="eager"` the copy is a plain PyTorch module, which `torch.export`, `torch.compile` and the ONNX
    exporter take. The other backends run it in a compiled form; what they chose is in the attribute `choice` and in the
    log of `convmixer.runtime.optimize`.

    Args:
        model: A `ConvMixer`, complete or truncated, or what `create_model(features_only=True)` returns; also inside
            `torch.compile`, DataParallel, DistributedDataParallel, or an average of weights.
        normalization: Fold mean and std of the model's `pretrained_cfg` into the first convolution, too: the copy takes
            images with values in [0, 1], and its `pretrained_cfg` says mean 0 and std 1, as `predict` and
            `create_transform` need it.
        dtype: Type to compute in, such as `torch.bfloat16` or "bfloat16"; None keeps the model's. "auto" takes
            bfloat16 where the hardware multiplies matrices in it, else float32. `torch.int8` quantizes the convolutions
            and computes everything else in the type of "auto"; it needs `calibration` and `backend` "native",
            "openvino" or "auto".
        backend: "eager"; "compile" (TorchInductor); on CPUs "openvino", "onnxruntime" and "native" (own kernels, for
            x86 with AVX-512); on CUDA devices "triton" (own kernels); or "auto": of those that work here the
            one that is usually fastest, or with an `example` the one that was measured to be.
        chunk: Most images to compute at a time by one thread ("compile" on a CPU: times its threads); larger batches
            are split. None: on CPUs as many as fill a core's second-level cache. "native" takes only single images.
        threads: Of "openvino", "onnxruntime" and "native"; None: as many as PyTorch uses. After a call that another
            program held up, "native" takes one for a while.
        calibration: For int8: images as the model takes them (N, C, H, W), or a folder, a tar or a name such as
            `torch/cifar10`, of which at most 512 training images are taken. Never give test images.
        example: Images (B, C, H, W) as the model will get them: backends and chunk sizes are timed with it, and the
            fastest is taken. It takes seconds, with "compile" among them minutes.
        graphs: On a CUDA device, replay calls as CUDA graphs, one for each shape that comes a second time: for few or
            small images, whose kernels take the GPU less time than launching them takes the host. At most eight graphs
            are kept. "auto" does so for feature maps of at most 32 MiB, with every backend but "eager"; True for
            feature maps of any size, at the cost of their memory.

    Returns:
        A `FoldedConvMixer` with "eager" (for a feature extractor timm's `FeatureGetterNet` around one), otherwise an
        `OptimizedConvMixer`.

    Raises:
        ArgumentError: Another kind of module, or one with layers that are not a ConvMixer's; a type or a device that
            the backend does not compute; `normalization` for a model that says nothing about its preprocessing;
            arguments that contradict each other.
        DependencyError: A backend that is not installed; the message says how to get it.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").eval()
        >>> fast = convmixer.optimize(model)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> torch.allclose(fast(images), model(images), atol=1e-4)
        True
    """
    _check_backend(backend, chunk=chunk, threads=threads)
    model = unwrap(model)
    original = find_convmixer(model)
    check_layers(original)
    weight = next(original.parameters())
    computed = _resolve_dtype(dtype, weight)
    backends, reason = candidates(backend, model, weight.device, computed)
    if computed != torch.int8:
        check_dtype(computed)
    _check_calibration(computed, calibration)
    _check_graphs(graphs, backend, weight.device)
    if backend == "eager":
        if chunk is not None or threads is not None or example is not None:
            raise ArgumentError("chunk, threads and example need a backend other than 'eager', such as 'auto'")
        return fold(model, normalization, computed)
    _check_chunk(chunk, backend, backends)
    _check_example(example, original)
    if threads is not None and backend in ("compile", "triton"):
        raise ArgumentError(f"threads is not for backend={backend!r}, which takes PyTorch's: torch.set_num_threads")
    request = Request(model, normalization, computed, threads or torch.get_num_threads(), calibration, graphs)
    if example is None:
        optimized = first_that_works(request, backends, chunk, reason)
    else:
        optimized = fastest(request, backends, chunk, example)
    _LOGGER.info("%s", optimized.choice)
    return optimized


def _check_backend(backend: str, **counts: int | None) -> None:
    check_backend(backend)
    for name, value in counts.items():
        if value is not None and not is_count(value):
            raise ArgumentError(f"{name}={value!r}: give a whole number of at least 1, or None")


def _resolve_dtype(dtype: torch.dtype | str | None, weight: Tensor) -> torch.dtype:
    """Return the type to compute in, for a model with this weight."""
    given = as_dtype(dtype)
    if given == "auto":
        return torch.bfloat16 if bf16_is_faster(weight.device) else torch.float32
    if given is None:
        return weight.dtype
    if not isinstance(given, torch.dtype):
        raise ArgumentError(f"dtype={given!r}: give a floating point type such as 'bfloat16', 'int8', or 'auto'")
    return given


def _check_calibration(dtype: torch.dtype, calibration: Tensor | str | Path | None) -> None:
    if (dtype == torch.int8) != (calibration is not None):
        what = "calibration is only for dtype=torch.int8" if calibration is not None else f"dtype={dtype} needs images"
        raise ArgumentError(f"{what}: give both, calibration being training images or a folder of them")


def _check_graphs(graphs: bool | str, backend: str, device: torch.device) -> None:
    if not (isinstance(graphs, bool) or graphs == "auto"):
        raise ArgumentError(f"graphs={graphs!r}; valid: True, False, 'auto'")
    if graphs is True and (device.type != "cuda" or backend == "eager"):
        raise ArgumentError(
            f"graphs=True is for CUDA devices and backends other than 'eager', not for {backend!r} on {device}: "
            "leave it out"
        )


def _check_example(example: Tensor | None, original: ConvMixer) -> None:
    if example is None:
        return
    if not isinstance(example, Tensor) or not example.numel():
        what = f"one of shape {tuple(example.shape)}" if isinstance(example, Tensor) else describe(example)
        raise ArgumentError(f"example is {what}: give a tensor of images (B, C, H, W), as the model will get them")
    check_input(example, original.in_chans, original.patch_size)


def _check_chunk(chunk: int | None, name: str, backends: tuple[Backend, ...]) -> None:
    if chunk is not None and name != "auto" and not backends[0].splits_batches:
        raise ArgumentError(f"chunk={chunk}: {name} computes single images; leave it out")
