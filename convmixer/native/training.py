"""A ConvMixer's stem and blocks in training, forward and backward, in one call each of `csrc/train.cpp`.

What is kept for the backward pass lies in memory that is used again by the next step, on large pages: a training step
that maps its activations anew spends much of its time in page faults.
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
from convmixer.ops import fused
from convmixer.ops.depthwise import compute_dtype

_LOGGER = logging.getLogger(__name__)
_FOLDER = library.SOURCES[0].parent
SOURCES = [_FOLDER / name for name in ("train.cpp", "train.h", "train_amx.h", "train_fma.h", "cpu.h", "cpu_tiles.h")]
KERNEL_SIZES = range(1, 16)
DTYPES = (torch.float32, torch.bfloat16)
_forked = False  # a child by fork, where OpenMP would wait for threads of its parent


class LayerRecord(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias", "mean", "var", "moments")),
        *((f"grad_{name}", ctypes.c_void_p) for name in ("weight", "bias", "norm_weight", "norm_bias")),
        ("eps", ctypes.c_float),
        ("batch", ctypes.c_int32),
    ]


_NUMBERS = (
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
    _fields_ = [
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("images", ctypes.c_void_p),
        ("layers", ctypes.POINTER(LayerRecord)),
        *((name, ctypes.c_void_p) for name in ("kept", "scratch", "features")),
    ]


RECORDS = (LayerRecord, StepRecord)


@functools.lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """Return the compiled kernels; a DependencyError if they cannot be compiled, or kept and run nowhere."""
    loaded = library.load(SOURCES)
    library.check_records(loaded, RECORDS)
    loaded.convmixer_bytes.restype = ctypes.c_int64
    return loaded


@functools.lru_cache(maxsize=1)
def _lacking() -> str | None:
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

_free: list[mmap.mmap] = []  # what no tensor uses


def release_memory() -> None:
    """Give back to the system what the kernels keep for their next call, and no tensor uses."""
    _free.clear()


def _memory(size: int) -> Tensor:
    """Return bytes, not initialised, of memory that is used again when the tensor is gone."""
    size = max(size, 1)  # there may be no images
    fitting = [region for region in _free if len(region) >= size]
    try:
        region = min(fitting, key=len)
        _free.remove(region)
    except ValueError:  # there is none, or another thread took it
        _free.clear()  # of what is too small nothing stays
        try:
            region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConvMixerError(
                f"{size / 2**20:.0f} MiB for feature maps cannot be had ({error.strerror}): give fewer images at a "
                "time, or keep less by set_grad_checkpointing()"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without large pages
                region.madvise(mmap.MADV_HUGEPAGE)
    array = (ctypes.c_char * size).from_buffer(region)
    weakref.finalize(array, _free.append, region).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8)


def _after_fork() -> None:
    global _forked
    _forked = True
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- operators ------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """What the kernels are told of a model besides its tensors.

    Attributes:
        relu: Its activations are ReLU, else GELU.
        patch_size: Side of a patch.
        eps: Of each BatchNorm: the stem's, then both of each block.
        batch: Whether each of them uses the statistics of the batch.
        half: Feature maps are bfloat16, else float32.
        keep: 2 to keep both feature maps of a block for the backward pass, 1 to keep one, 0 for no backward pass.
    """

    relu: bool
    patch_size: int
    eps: tuple[float, ...]
    batch: tuple[bool, ...]
    half: bool
    keep: int


def _feature_size(images: Tensor, patch_size: int) -> tuple[Any, Any]:
    return images.shape[2] // patch_size, images.shape[3] // patch_size


def _rounded_up(n: Any, unit: int) -> Any:
    return (n + unit - 1) // unit * unit


def _map_bytes(images: Tensor, dim: int, patch_size: int, half: bool) -> Any:
    """Return the bytes of a feature map, with rows filled up to 16, positions and channels to 32."""
    height, width = _feature_size(images, patch_size)
    positions = _rounded_up(height * _rounded_up(width, 16), 32)
    return images.shape[0] * _rounded_up(dim, 32) * positions * (2 if half else 4)


def _kept_bytes(images: Tensor, dim: int, norms: int, patch_size: int, half: bool, keep: int) -> Any:
    depth = norms // 2
    maps = {0: 2, 1: depth + 1, 2: 2 * depth + 1}[keep]
    return maps * _map_bytes(images, dim, patch_size, half) + norms * 5 * 4 * _rounded_up(dim, 32)


def _record(
    images: Tensor,
    parameters: Sequence[Tensor],
    network: Network,
    running: Tensor | None = None,
    moments: Sequence[Tensor] = (),
    grads: Sequence[Tensor] = (),
    *,
    kept: Tensor,
    features: Tensor,
    scratch: Tensor | None,
) -> StepRecord:
    count = len(network.eps)
    layers = (LayerRecord * count)()
    names = ("weight", "bias", "norm_weight", "norm_bias")
    groups = [(names, parameters), (tuple(f"grad_{name}" for name in names), grads)]
    groups += [(("mean", "var"), () if running is None else running.flatten(0, 1).unbind()), (("moments",), moments)]
    for i, layer in enumerate(layers):
        layer.eps, layer.batch = network.eps[i], network.batch[i]
        for fields, tensors in groups:
            for name, tensor in zip(fields, tensors[len(fields) * i : len(fields) * (i + 1)], strict=False):
                setattr(layer, name, tensor.data_ptr())
    batch, in_chans, height, width = images.shape
    return StepRecord(
        batch=batch,
        dim=len(parameters[0]),
        depth=count // 2,
        kernel_size=parameters[4].shape[-1],
        patch_size=network.patch_size,
        in_chans=in_chans,
        height=height,
        width=width,
        relu=network.relu,
        threads=1 if _forked else torch.get_num_threads(),
        keep=network.keep,
        images=images.data_ptr(),
        layers=layers,
        kept=kept.data_ptr(),
        scratch=None if scratch is None else scratch.data_ptr(),
        features=features.data_ptr(),
    )


def _call(function: Any, record: StepRecord, half: bool) -> None:
    if not function(ctypes.byref(record), ctypes.c_int(half)):
        raise ConvMixerError(
            f"too little memory for {record.batch} images of {record.height} x {record.width}: give fewer at a time"
        )


_LIBRARY = torch.library.Library("convmixer", "FRAGMENT")
_NETWORK = "bool relu, int patch_size, float[] eps, bool[] batch, bool half, int keep"
_LIBRARY.define(
    f"native_forward(Tensor images, Tensor[] parameters, Tensor running, {_NETWORK}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"native_backward(Tensor grad, Tensor kept, Tensor images, Tensor[] parameters, {_NETWORK}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _outputs(images: Tensor, parameters: Sequence[Tensor], network: Network) -> tuple[Tensor, Tensor]:
    dim, (height, width) = len(parameters[0]), _feature_size(images, network.patch_size)
    dtype = torch.bfloat16 if network.half else torch.float32
    features = images.new_empty((len(images), dim, height, width), dtype=dtype)
    return features, images.new_zeros((len(network.eps), 3, dim))


def _forward(
    images: Tensor, parameters: Sequence[Tensor], running: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the features of the last block, (B, dim, h, w).

    Args:
        images: (B, in_chans, H, W), contiguous float32, as all tensors here.
        parameters: Of each layer (the stem, then depthwise and pointwise of each block) weight and bias, and those of
            its BatchNorm.
        running: Mean and variance for each BatchNorm, (layers, 2, dim); not read where those of the batch are used.
        settings: The fields of `Network`.

    Returns:
        The features; mean, variance and variance without bias of each BatchNorm, (layers, 3, dim); what the backward
        pass needs.
    """
    network = Network(*settings)
    features, moments = _outputs(images, parameters, network)
    sizes = len(parameters[0]), len(network.eps), network.patch_size, network.half, network.keep
    kept = _memory(_kept_bytes(images, *sizes))
    scratch = None if network.keep == 2 else _memory(_map_bytes(images, sizes[0], network.patch_size, network.half))
    record = _record(
        images, parameters, network, running, moments.unbind(), kept=kept, features=features, scratch=scratch
    )
    library_size = kernels().convmixer_bytes(ctypes.byref(record), ctypes.c_int(network.half))
    if library_size != len(kept):
        raise ConvMixerError(f"train.cpp keeps {library_size} bytes and native/training.py {len(kept)}")
    _call(kernels().convmixer_forward, record, network.half)
    return features, moments, kept


def _fake_forward(
    images: Tensor, parameters: Sequence[Tensor], running: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    network = Network(*settings)
    sizes = len(parameters[0]), len(network.eps), network.patch_size, network.half, network.keep
    kept = images.new_empty(_kept_bytes(images, *sizes), dtype=torch.uint8)
    return *_outputs(images, parameters, network), kept


def _backward(
    grad: Tensor,
    kept: Tensor,
    images: Tensor,
    parameters: Sequence[Tensor],
    *settings: Any,
) -> list[Tensor]:
    """Compute the gradients of the parameters; `grad` is that of the features, of their type and contiguous."""
    network = Network(*settings)
    grads = [torch.empty_like(parameter) for parameter in parameters]
    size = _map_bytes(images, len(parameters[0]), network.patch_size, network.half)
    scratch = _memory(size if network.keep == 2 else 2 * size)
    record = _record(images, parameters, network, grads=grads, kept=kept, features=grad, scratch=scratch)
    _call(kernels().convmixer_backward, record, network.half)
    return grads


def _fake_backward(
    grad: Tensor, kept: Tensor, images: Tensor, parameters: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
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
    """Let fused blocks on CPUs run on these kernels, as they do by default, or on the PyTorch reference.

    The choice holds for the whole process. A model that is compiled already is compiled anew.
    """
    global _enabled
    _enabled = enabled
    if not enabled:
        release_memory()


def refusal(stem: Any, blocks: Any, dtype: torch.dtype, sync_batchnorm: bool = False) -> str | None:
    """Return why the kernels do not compute a stem and blocks, as `fused.check` expects them; None if they do.

    Args:
        stem: Convolution, activation, BatchNorm.
        blocks: See `fused.check`.
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
def _say(reason: str | None, dtype: torch.dtype) -> None:
    if reason is None:
        units = "AMX" if kernels().convmixer_tiles() else "AVX-512"
        _LOGGER.info("fused blocks in %s run on native kernels, on %s", dtype, units)
    else:
        _LOGGER.info("fused blocks in %s run on PyTorch: %s", dtype, reason)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(reason: str | None, dtype: torch.dtype) -> bool:
    """Return whether nothing speaks against the kernels; the log says once what was chosen."""
    _say(reason, dtype)
    return reason is None


def takes(stem: Any, blocks: Any, images: Tensor, taken: Sequence[int], sync_batchnorm: bool) -> bool:
    """Return whether `features` computes these images; the log says why not."""
    if images.device.type != "cpu" or stem[0].weight.device.type != "cpu":
        return False
    patch, in_chans = stem[0].kernel_size[0], stem[0].weight.shape[1]
    if images.ndim != 4 or images.shape[1] != in_chans or images.shape[2] < patch or images.shape[3] < patch:
        return False  # PyTorch says what is wrong with them
    dtype, parameters = compute_dtype(images), stem[0].weight.dtype
    reason = refusal(stem, blocks, dtype, sync_batchnorm)
    if list(taken) != [len(blocks) - 1]:
        reason = "features of several blocks are wanted, and the native kernels give the last one's"
    elif images.requires_grad and torch.is_grad_enabled():
        reason = "a gradient of the images is wanted, which the native kernels do not compute"
    elif parameters != images.dtype and not (torch.is_autocast_enabled("cpu") and parameters in (dtype, torch.float32)):
        reason = f"images of {images.dtype} and parameters of {parameters} do not go together"
    chosen: bool = _chosen(reason, dtype)
    return chosen


class _Stack(Function):
    """`_forward`, its arguments in another order."""

    @staticmethod
    def forward(images: Tensor, running: Tensor, network: Network, *parameters: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = forward(images, parameters, running, *network)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        images, _, ctx.network, *parameters = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(images, output[2], *parameters)
        ctx.dtype = output[0].dtype

    @staticmethod
    @fused.first_derivative
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        images, kept, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(wanted)
        grads = backward(grad.to(ctx.dtype).contiguous(), kept, images, parameters, *ctx.network)
        return None, None, None, *(each if needed else None for each, needed in zip(grads, wanted[3:], strict=True))


def features(
    stem: Any, blocks: Any, images: Tensor, *, checkpointing: bool = False, channels_last: bool = False
) -> Tensor:
    """Return what the last block makes of images, (B, C, h, w), as `fused.features` computes it.

    Args:
        stem: Convolution, activation, BatchNorm.
        blocks: See `fused.check`.
        images: (B, in_chans, H, W).
        checkpointing: Keep one feature map per block, u, and compute c anew.
        channels_last: Give the features in channels_last.
    """
    layers = fused.layers(stem, blocks)
    batch = tuple(norm.training or norm.running_mean is None for _, norm in layers)
    parameters: list[Tensor] = []
    running: list[Tensor] = []
    for (convolution, norm), now in zip(layers, batch, strict=True):
        parameters += [convolution.weight, convolution.bias]
        bias = convolution.bias.detach()
        parameters += [bias.new_ones(len(bias)) if norm.weight is None else norm.weight]
        parameters += [bias.new_zeros(len(bias)) if norm.bias is None else norm.bias]
        running += [bias, bias] if now else [norm.running_mean, norm.running_var]
    dtype = compute_dtype(images)
    differentiable = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    network = Network(
        relu=type(stem[1]) is nn.ReLU,
        patch_size=stem[0].kernel_size[0],
        eps=tuple(norm.eps for _, norm in layers),
        batch=batch,
        half=dtype == torch.bfloat16,
        keep=0 if not differentiable else 1 if checkpointing else 2,
    )
    height, width = _feature_size(images, network.patch_size)
    if any(batch):
        fused.check_count((len(images), len(parameters[0]), height, width))
    parameters = [parameter.to(torch.float32).contiguous() for parameter in parameters]
    kept = torch.stack(running).to(torch.float32).unflatten(0, (len(layers), 2))
    result, moments, _ = _Stack.apply(images.detach().to(torch.float32).contiguous(), kept, network, *parameters)
    if any(batch):
        fused.track([norm for _, norm in layers], [fused.Moments(*its.unbind()) for its in moments.unbind()])
    found: Tensor = result.contiguous(memory_format=torch.channels_last) if channels_last else result
    return found
