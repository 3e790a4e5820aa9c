"""A ConvMixer's stem and blocks in training, forward and backward, in one call each of `csrc/train.cpp`.

The memory that holds what the backward pass needs is on large pages, and the next step uses it again: a step that maps
new memory for its activations spends much of its time in page faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from convmixer.errors import ConvMixerError, DependencyError
from convmixer.native import library
from convmixer.native.thread_count import is_forked
from convmixer.ops import fused
from convmixer.ops.depthwise import compute_dtype

_LOGGER = logging.getLogger(__name__)
_FOLDER = library.SOURCES[0].parent
SOURCES = [_FOLDER / name for name in ("train.cpp", "train.h", "train_amx.h", "train_fma.h", "cpu.h", "cpu_tiles.h")]
KERNEL_SIZES = range(1, 16)
DTYPES = (torch.float32, torch.bfloat16)


class LayerRecord(ctypes.Structure):
    """`Layer` of `train.h`: a convolution with its BatchNorm, by the addresses of its float32 tensors."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias", "mean", "var", "moments")),
        *((f"grad_{name}", ctypes.c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias")),
        ("eps", ctypes.c_float),
        ("batch", ctypes.c_int32),
    ]


_INTEGERS = (
    "batch",
    "dim",
    "depth",
    "kernel_size",
    "patch_size",
    "in_chans",
    "height",
    "width",
    "relu",
    "threads",
    "keep",
)


class StepRecord(ctypes.Structure):
    """`Step` of `train.h`: what one call of the kernels reads and writes."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _INTEGERS),
        ("images", ctypes.c_void_p),
        ("layers", ctypes.POINTER(LayerRecord)),
        *((name, ctypes.c_void_p) for name in ("kept", "scratch", "features")),
    ]


RECORDS = (LayerRecord, StepRecord)


@functools.lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """Return the compiled kernels; raise a DependencyError if they cannot be compiled, or kept and run nowhere."""
    loaded = library.load(SOURCES)
    library.check_records(loaded, RECORDS)
    loaded.convmixer_bytes.restype = ctypes.c_int64
    return loaded


@functools.lru_cache(maxsize=1)
def _lacking() -> str | None:
    """Load the kernels once; see `lacking`."""
    try:
        kernels()
    except DependencyError as error:
        return str(error)
    except OSError as error:  # nothing can be written, or a library that it needs is missing
        return f"native kernels cannot be loaded: {error}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def lacking() -> str | None:
    """Return why the kernels do not run on this machine; None where they do."""
    return _lacking()  # torch.compile warns of a cached function that it meets itself


# ---- memory ---------------------------------------------------------------------------------------------------------

_free: list[mmap.mmap] = []  # regions that no tensor uses


def release_memory() -> None:
    """Give memory that no tensor uses back to the system, instead of keeping it for the next call of the kernels."""
    _free.clear()


def _allocate(size: int) -> Tensor:
    """Return a tensor (size,) of bytes, not initialised; when it is gone, its memory goes to `_free`.

    Raises:
        ConvMixerError: The system has too little memory.
    """
    size = max(size, 1)  # there may be no images
    fitting = [region for region in _free if len(region) >= size]
    try:
        region = min(fitting, key=len)
        _free.remove(region)
    except ValueError:  # there is none, or another thread took it
        _free.clear()  # regions that are too small would never be used again
        try:
            region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConvMixerError(
                f"{size / 2**20:.0f} MiB for feature maps cannot be allocated ({error.strerror}): give fewer images at "
                "a time, or keep less by set_grad_checkpointing()"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without large pages
                region.madvise(mmap.MADV_HUGEPAGE)
    array = (ctypes.c_char * size).from_buffer(region)
    weakref.finalize(array, _free.append, region).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8)


def _after_fork() -> None:
    """Unmap what the parent kept."""
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- operators ------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the kernels need to know of a model besides its tensors. A layer is a convolution with its BatchNorm.

    Attributes:
        relu: Activations are ReLU, else GELU.
        patch_size: Side of a patch in pixels.
        eps: That of each layer's BatchNorm: the stem's, then depthwise and pointwise of each block.
        batch: Whether each layer's BatchNorm uses the statistics of the batch, else the running ones.
        bfloat16: Feature maps are bfloat16, else float32.
        keep: 2 to keep both feature maps of a block for the backward pass, 1 to keep u and compute c again, 0 for no
            backward pass.
    """

    relu: bool
    patch_size: int
    eps: tuple[float, ...]
    batch: tuple[bool, ...]
    bfloat16: bool
    keep: int


def _feature_size(images: Tensor, patch_size: int) -> tuple[Any, Any]:
    """Return height and width of the feature maps: integers, or symbols while PyTorch traces."""
    return images.shape[2] // patch_size, images.shape[3] // patch_size


def _rounded_up(n: Any, unit: int) -> Any:
    return (n + unit - 1) // unit * unit


def _map_bytes(images: Tensor, dim: int, settings: Settings) -> Any:
    """Return the bytes of a feature map, with rows filled up to 16, positions and channels to 32, as in `train.h`."""
    height, width = _feature_size(images, settings.patch_size)
    positions = _rounded_up(height * _rounded_up(width, 16), 32)
    return images.shape[0] * _rounded_up(dim, 32) * positions * (2 if settings.bfloat16 else 4)


def _kept_bytes(images: Tensor, dim: int, settings: Settings) -> Any:
    """Return the bytes that the forward pass fills: feature maps, and five float32 vectors for each layer.

    The maps are u of the stem and of each block, and c of each block if both are kept. Without a backward pass two maps
    take turns.
    """
    layers = len(settings.eps)
    depth = layers // 2
    maps = {0: 2, 1: depth + 1, 2: 2 * depth + 1}[settings.keep]
    return maps * _map_bytes(images, dim, settings) + layers * 5 * 4 * _rounded_up(dim, 32)


def _step_record(
    images: Tensor,
    parameters: Sequence[Tensor],
    settings: Settings,
    running: Tensor | None = None,
    moments: Sequence[Tensor] = (),
    grads: Sequence[Tensor] = (),
    *,
    kept: Tensor,
    features: Tensor,
    scratch: Tensor | None,
) -> StepRecord:
    """Return the record of a call. It holds addresses: the tensors must live until the call returns.

    Args:
        images: As `_forward`.
        parameters: As `_forward`.
        settings: Of the model.
        running: As `_forward`; None for the backward pass.
        moments: What the forward pass writes, (3, dim) for each layer.
        grads: What the backward pass writes, one for each parameter.
        kept: `_kept_bytes` that the forward pass writes and the backward pass reads.
        features: The output of the forward pass, or its gradient for the backward pass, (B, dim, h, w).
        scratch: Bytes for c, if it is not kept, and for the gradient of a feature map in the backward pass.
    """
    count = len(settings.eps)
    layers = (LayerRecord * count)()
    names = ("weight", "bias", "norm_weight", "norm_bias")
    groups = [(names, parameters), (tuple(f"grad_{name}" for name in names), grads)]
    groups += [(("mean", "var"), () if running is None else running.flatten(0, 1).unbind()), (("moments",), moments)]
    for i, layer in enumerate(layers):
        layer.eps, layer.batch = settings.eps[i], settings.batch[i]
        for fields, tensors in groups:
            for name, tensor in zip(fields, tensors[len(fields) * i : len(fields) * (i + 1)], strict=False):
                setattr(layer, name, tensor.data_ptr())
    batch, in_chans, height, width = images.shape
    return StepRecord(
        batch=batch,
        dim=len(parameters[0]),
        depth=count // 2,
        kernel_size=parameters[4].shape[-1],
        patch_size=settings.patch_size,
        in_chans=in_chans,
        height=height,
        width=width,
        relu=settings.relu,
        threads=1 if is_forked() else torch.get_num_threads(),
        keep=settings.keep,
        images=images.data_ptr(),
        layers=layers,
        kept=kept.data_ptr(),
        scratch=None if scratch is None else scratch.data_ptr(),
        features=features.data_ptr(),
    )


def _call(function: Any, record: StepRecord, bfloat16: bool) -> None:
    """Call a function of `train.cpp`; raise a ConvMixerError if its threads get too little memory."""
    if not function(ctypes.byref(record), ctypes.c_int(bfloat16)):
        raise ConvMixerError(
            f"too little memory for {record.batch} images of {record.height} x {record.width}: give fewer at a time"
        )


_LIBRARY = torch.library.Library("convmixer", "FRAGMENT")
_SETTINGS = "bool relu, int patch_size, float[] eps, bool[] batch, bool bfloat16, int keep"  # the fields of `Settings`
_LIBRARY.define(
    f"native_forward(Tensor images, Tensor[] parameters, Tensor running, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"native_backward(Tensor grad, Tensor kept, Tensor images, Tensor[] parameters, {_SETTINGS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _outputs(images: Tensor, parameters: Sequence[Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the features, not initialised, and zeros for the moments, as `_forward` describes them."""
    dim, (height, width) = len(parameters[0]), _feature_size(images, settings.patch_size)
    dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
    features = images.new_empty((len(images), dim, height, width), dtype=dtype)
    return features, images.new_zeros((len(settings.eps), 3, dim))


def _forward(
    images: Tensor, parameters: Sequence[Tensor], running: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute stem and blocks.

    Args:
        images: (B, in_chans, H, W), contiguous float32, as all tensors here.
        parameters: Of each layer (the stem, then depthwise and pointwise of each block) weight and bias, and those of
            its BatchNorm.
        running: Running mean and variance of each BatchNorm, (layers, 2, dim); not read where it uses the statistics
            of the batch.
        fields: Those of `Settings`.

    Returns:
        The output of the last block, (B, dim, h, w) in bfloat16 or float32; the moments of each BatchNorm's input,
        (layers, 3, dim): mean, variance, and variance without bias, or zeros where it uses running statistics; the
        bytes that the backward pass needs.

    Raises:
        ConvMixerError: Too little memory.
    """
    settings, dim = Settings(*fields), len(parameters[0])
    features, moments = _outputs(images, parameters, settings)
    kept = _allocate(_kept_bytes(images, dim, settings))
    scratch = None if settings.keep == 2 else _allocate(_map_bytes(images, dim, settings))
    record = _step_record(
        images, parameters, settings, running, moments.unbind(), kept=kept, features=features, scratch=scratch
    )
    expected = kernels().convmixer_bytes(ctypes.byref(record), ctypes.c_int(settings.bfloat16))
    if expected != len(kept):
        raise ConvMixerError(f"train.cpp keeps {expected} bytes and native/training.py {len(kept)}")
    _call(kernels().convmixer_forward, record, settings.bfloat16)
    return features, moments, kept


def _fake_forward(
    images: Tensor, parameters: Sequence[Tensor], running: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors like those of `_forward`, for tracing."""
    settings = Settings(*fields)
    kept = images.new_empty(_kept_bytes(images, len(parameters[0]), settings), dtype=torch.uint8)
    return *_outputs(images, parameters, settings), kept


def _backward(
    grad: Tensor,
    kept: Tensor,
    images: Tensor,
    parameters: Sequence[Tensor],
    *fields: Any,
) -> list[Tensor]:
    """Compute the gradients of the parameters.

    Args:
        grad: That of the features, (B, dim, h, w), of their type and contiguous.
        kept: From `_forward`.
        images: As `_forward`.
        parameters: As `_forward`.
        fields: Those of `Settings`.

    Returns:
        A gradient for each parameter, of its shape, in float32.

    Raises:
        ConvMixerError: Too little memory.
    """
    settings = Settings(*fields)
    grads = [torch.empty_like(parameter) for parameter in parameters]
    size = _map_bytes(images, len(parameters[0]), settings)
    scratch = _allocate(size if settings.keep == 2 else 2 * size)
    record = _step_record(images, parameters, settings, grads=grads, kept=kept, features=grad, scratch=scratch)
    _call(kernels().convmixer_backward, record, settings.bfloat16)
    return grads


def _fake_backward(
    grad: Tensor, kept: Tensor, images: Tensor, parameters: Sequence[Tensor], *fields: Any
) -> list[Tensor]:
    """Return tensors like those of `_backward`, for tracing."""
    return [torch.empty_like(parameter) for parameter in parameters]


_LIBRARY.impl("native_forward", _forward, "CPU")
_LIBRARY.impl("native_backward", _backward, "CPU")
_LIBRARY.impl("native_forward", _fake_forward, "Meta")  # `register_fake` would take a third of the import's time
_LIBRARY.impl("native_backward", _fake_backward, "Meta")
forward = torch.ops.convmixer.native_forward.default
backward = torch.ops.convmixer.native_backward.default


# ---- stem and blocks ------------------------------------------------------------------------------------------------

_enabled = True


def set_native_training(enabled: bool) -> None:
    """Run fused blocks on CPUs on these kernels, as by default, or on the PyTorch reference.

    The choice holds for the whole process. A compiled model is compiled again at its next call.
    """
    global _enabled
    _enabled = enabled
    if not enabled:
        release_memory()


def refusal(stem: Any, blocks: Any, dtype: torch.dtype, sync_batchnorm: bool = False) -> str | None:
    """Return why the kernels do not compute a stem and blocks; None if they do.

    Args:
        stem: Convolution, activation, BatchNorm, as `fused.check` accepts them.
        blocks: As `fused.check` accepts them.
        dtype: Of feature maps.
        sync_batchnorm: In training, BatchNorm sees the images of all processes.
    """
    if not _enabled:
        return "set_native_training(False) was called"
    if dtype not in DTYPES:
        return f"the native kernels compute in float32 and bfloat16, not {dtype}"
    convolution, act, _ = stem
    sizes = fused.kernel_sizes(blocks)
    norms = [norm for _, norm in fused.layers(stem, blocks)]
    patch = (convolution.kernel_size[0],) * 2
    geometry = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
    if type(act) not in (nn.GELU, nn.ReLU):
        return f"the native kernels take GELU and ReLU, this model has {type(act).__name__}"
    if len(set(sizes)) != 1 or sizes[0] not in KERNEL_SIZES:
        return f"the native kernels take one kernel size from 1 to {KERNEL_SIZES[-1]}, this model has {sizes}"
    if geometry != (patch, patch, (0, 0), (1, 1)) or convolution.groups != 1:
        return "the stem's convolution has overlapping or padded patches, which the native kernels do not take"
    dim = len(convolution.weight)
    widths = {(len(block[0].fn[0].weight), *block[1].weight.shape[:2]) for block in blocks}
    if widths != {(dim, dim, dim)} or any(module.num_features != dim for module in norms):
        return f"the native kernels take {dim} channels in every layer, as the stem has, and this model has others"
    if any(fused.is_synchronised(module, sync_batchnorm) for module in norms):
        return "BatchNorm is synchronised between processes, which the native kernels do not do"
    reason: str | None = lacking()
    return reason


@functools.lru_cache(maxsize=64)
def _log_choice(reason: str | None, dtype: torch.dtype) -> None:
    """Log what computes fused blocks, and why it is not the kernels; once for each reason and type."""
    if reason is None:
        units = "AMX" if kernels().convmixer_tiles() else "AVX-512"
        _LOGGER.info("fused blocks in %s run on native kernels, on %s", dtype, units)
    else:
        _LOGGER.info("fused blocks in %s run on PyTorch: %s", dtype, reason)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(reason: str | None, dtype: torch.dtype) -> bool:
    """Return whether the kernels are used: there is no reason against them. Log the choice."""
    _log_choice(reason, dtype)
    return reason is None


def takes(stem: Any, blocks: Any, images: Tensor, taken: Sequence[int], sync_batchnorm: bool) -> bool:
    """Return whether `features` computes stem and blocks for images; log why not.

    Args:
        stem: As in `refusal`.
        blocks: As in `refusal`.
        images: (B, in_chans, H, W); False for images that no stem takes, so that PyTorch raises its error.
        taken: The blocks whose output is wanted, as numbers.
        sync_batchnorm: As in `refusal`.
    """
    if images.device.type != "cpu" or stem[0].weight.device.type != "cpu":
        return False
    patch, in_chans = stem[0].kernel_size[0], stem[0].weight.shape[1]
    if images.ndim != 4 or images.shape[1] != in_chans or images.shape[2] < patch or images.shape[3] < patch:
        return False
    dtype, parameters = compute_dtype(images), stem[0].weight.dtype
    reason = refusal(stem, blocks, dtype, sync_batchnorm)
    if list(taken) != [len(blocks) - 1]:
        reason = "features of several blocks are wanted, and the native kernels give the last one's"
    elif images.requires_grad and torch.is_grad_enabled():
        reason = "a gradient of the images is wanted, which the native kernels do not compute"
    elif not images.is_floating_point():  # autocast does not cast them, and layers refuse them
        reason = f"images of {images.dtype} are not floating point"
    elif parameters != images.dtype and not (torch.is_autocast_enabled("cpu") and parameters in (dtype, torch.float32)):
        reason = f"images of {images.dtype} and parameters of {parameters} do not go together"
    chosen: bool = _chosen(reason, dtype)
    return chosen


class _StemAndBlocks(Function):
    """`forward` with its gradients for the parameters."""

    @staticmethod
    def forward(images: Tensor, running: Tensor, settings: Settings, *parameters: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = forward(images, parameters, running, *settings)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        images, _, ctx.settings, *parameters = inputs
        features, _, kept = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(images, kept, *parameters)
        ctx.dtype = features.dtype

    @staticmethod
    @fused.first_derivative
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        images, kept, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(wanted)
        grads = backward(grad.to(ctx.dtype).contiguous(), kept, images, parameters, *ctx.settings)
        return None, None, None, *(each if needed else None for each, needed in zip(grads, wanted[3:], strict=True))


def _tensors_of_layers(
    layers: Sequence[tuple[Any, Any]], by_batch: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of convolutions with their BatchNorm, four each, and running mean and variance, two each.

    Ones and zeros stand for the weight and the bias that a BatchNorm lacks. Where it uses the statistics of the batch,
    the running ones are vectors of their shape that are not read.
    """
    parameters: list[Tensor] = []
    running: list[Tensor] = []
    for (convolution, norm), of_batch in zip(layers, by_batch, strict=True):
        bias = convolution.bias.detach()
        parameters += [convolution.weight, convolution.bias]
        parameters += [bias.new_ones(len(bias)) if norm.weight is None else norm.weight]
        parameters += [bias.new_zeros(len(bias)) if norm.bias is None else norm.bias]
        running += [bias, bias] if of_batch else [norm.running_mean, norm.running_var]
    return parameters, running


def features(
    stem: Any, blocks: Any, images: Tensor, *, checkpointing: bool = False, channels_last: bool = False
) -> Tensor:
    """Compute stem and blocks, and move running statistics, as `fused.features` does.

    Args:
        stem: Convolution, activation, BatchNorm.
        blocks: As `fused.check` accepts them.
        images: (B, in_chans, H, W).
        checkpointing: Keep one feature map per block, u, and compute c again in the backward pass.
        channels_last: Return the features in channels_last.

    Returns:
        The output of the last block, (B, dim, h, w), in float32, or bfloat16 for such images or under autocast.

    Raises:
        ArgumentError: BatchNorm has fewer than two values per channel.
        ConvMixerError: Too little memory.
    """
    layers = fused.layers(stem, blocks)
    norms = [norm for _, norm in layers]
    by_batch = tuple(norm.training or norm.running_mean is None for norm in norms)
    parameters, running = _tensors_of_layers(layers, by_batch)
    differentiable = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    settings = Settings(
        relu=type(stem[1]) is nn.ReLU,
        patch_size=stem[0].kernel_size[0],
        eps=tuple(norm.eps for norm in norms),
        batch=by_batch,
        bfloat16=compute_dtype(images) == torch.bfloat16,
        keep=0 if not differentiable else 1 if checkpointing else 2,
    )
    height, width = _feature_size(images, settings.patch_size)
    if any(by_batch):
        fused.check_count((len(images), len(parameters[0]), height, width))
    parameters = [parameter.to(torch.float32).contiguous() for parameter in parameters]
    statistics = torch.stack(running).to(torch.float32).unflatten(0, (len(layers), 2))
    images = images.detach().to(torch.float32).contiguous()
    if differentiable:
        result, moments, _ = _StemAndBlocks.apply(images, statistics, settings, *parameters)
    else:  # where nothing has a gradient, torch.compile cannot trace a Function that takes *arguments
        result, moments, _ = forward(images, parameters, statistics, *settings)
    if any(by_batch):
        fused.track(norms, [fused.Moments(*of_layer.unbind()) for of_layer in moments.unbind()])
    output: Tensor = result.contiguous(memory_format=torch.channels_last) if channels_last else result
    return output
