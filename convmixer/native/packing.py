"""A folded model in the records and the order of weights that the kernels in `csrc/` read, and the call to them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from convmixer.errors import DependencyError
from convmixer.native.library import check_records, library
from convmixer.native.thread_count import ThreadCount

if TYPE_CHECKING:
    from convmixer.runtime.folding import FoldedConvMixer

PANEL = 64  # output channels that are packed together; PANEL in cpu.cpp
LARGEST_KERNEL = 15  # on tiles; LARGEST in cpu_tiles.h
LARGEST_KERNEL_INT8 = 13  # LARGEST_BYTES in cpu_bytes.h


def refusal(model: Any, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not compute a `ConvMixer` in float32, bfloat16 or int8; None if they do."""
    acts = [model.stem[1], *(act for block in model.blocks for act in (block[0].fn[1], block[2]))]
    sizes = {block[0].fn[0].kernel_size[0] for block in model.blocks}
    if model.dim % PANEL:
        return f"native takes models whose dim is a multiple of {PANEL}, this one has {model.dim}"
    for act in acts:
        if type(act) not in (nn.GELU, nn.ReLU) or getattr(act, "approximate", "none") != "none":
            return f"native takes the activations gelu and relu, this model has {act}"
    if len({type(act) for act in acts}) > 1:
        return "native takes one activation in all layers, this model has gelu and relu"
    if len(sizes) > 1:
        return f"native takes one kernel size in all blocks, this model has {', '.join(map(str, sorted(sizes)))}"
    if dtype == torch.int8 and max(sizes) > LARGEST_KERNEL_INT8:
        return f"native takes kernels of at most {LARGEST_KERNEL_INT8} in int8, this model has {max(sizes)}"
    return None


# ---- records, as cpu.h declares them --------------------------------------------------------------------------------


class AffineRecord(ctypes.Structure):
    """`Affine` of `cpu.h`: what follows a convolution x, `scale*act(x + bias) + shift`; addresses of (dim,) float32."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("bias", "scale", "shift")]


class BlockRecord(ctypes.Structure):
    """`Block` of `cpu.h`: the packed weights of a block. The last three fields are only for int8."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "bias", "gain", "pointwise")),
        ("end", AffineRecord),
        ("tables", ctypes.c_void_p * 2),
        ("zeros", ctypes.c_void_p),
        ("lifts", ctypes.c_void_p),
    ]


_INTEGERS = ("dim", "depth", "kernel_size", "patch_size", "in_chans", "relu", "stem_inputs", "amx")


class ModelRecord(ctypes.Structure):
    """`Model` of `cpu.h`: sizes, the packed stem, and the blocks. `last` is only for int8."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in _INTEGERS),
        ("stem", ctypes.c_void_p),
        ("stem_end", AffineRecord),
        ("blocks", ctypes.POINTER(BlockRecord)),
        ("last", ctypes.c_void_p),
    ]


RECORDS = (AffineRecord, BlockRecord, ModelRecord)


# ---- the model ------------------------------------------------------------------------------------------------------


class Native:
    """A folded model in the native kernels. Each thread computes an image; all threads share the images left over.

    Args:
        folded: In float32 on the CPU.
        dtype: Type of activations and weights, float32 or bfloat16. Sums are float32. `NativeInt8` passes int8.
        threads: Number of threads; after a call that was held up, one for a while, see `ThreadCount`.

    Raises:
        DependencyError: The kernels cannot be compiled, or do not compute in int8 here.
    """

    def __init__(self, folded: FoldedConvMixer, dtype: torch.dtype, threads: int) -> None:
        self.folded, self.dtype, self._thread_count = folded, dtype, ThreadCount(threads)
        kernels = library()
        check_records(kernels, RECORDS)
        if dtype == torch.int8 and not (hasattr(kernels, "convmixer_int8") and kernels.convmixer_amx()):
            raise DependencyError(
                "native computes int8 on AMX, which this compiler does not know or this system does not permit: "
                "choose openvino, or name another compiler in CXX"
            )
        self._forward = getattr(kernels, f"convmixer_{str(dtype).removeprefix('torch.')}")
        block: Any = folded.blocks[0]
        kernel_size: int = block.depthwise.kernel_size[0]
        self._amx = bool(kernels.convmixer_amx()) and (dtype == torch.float32 or kernel_size <= LARGEST_KERNEL)
        self._packed_tensors: list[Tensor] = []  # which the record points to
        self._record = self._pack(folded, kernel_size)

    def after_fork(self) -> None:
        """Do nothing: `ThreadCount` is one thread then."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pack again in copies and pickles: a record holds addresses."""
        return type(self), (self.folded, self.dtype, self._thread_count.most)

    @property
    def planar(self) -> bool:
        """Whether activations are planar, computed by tiles; otherwise they are channels-last."""
        return self._amx and self.dtype != torch.float32

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the head's output for images (B, in_chans, H, W): a list with one tensor, (B, num_classes).

        Raises:
            MemoryError: Too little memory.
        """
        x = x.detach().float().contiguous()
        batch, _, height, width = x.shape
        pooled = self.folded.global_pool.pool_type in ("avg", "fastavg")
        patch = self.folded.patch_size
        sides: Sequence[int] = () if pooled else (height // patch, width // patch)
        dim = self._record.dim
        shape = (batch, dim, *sides) if self.planar else (batch, *sides, dim)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever PyTorch's defaults are
        images, result, threads = x.data_ptr(), out.data_ptr(), self._thread_count.next()
        begun = time.perf_counter()
        if not self._forward(ctypes.byref(self._record), images, batch, height, width, result, pooled, threads):
            raise MemoryError(f"too little memory for images of {height} x {width}")
        self._thread_count.note(tuple(x.shape), threads, time.perf_counter() - begun)
        out = self._dequantize(out)
        features = out[:, :, None, None] if pooled else out if self.planar else out.permute(0, 3, 1, 2)
        with torch.no_grad():
            return [self.folded.forward_head(self.folded.norms[-1](features))]

    def _dequantize(self, out: Tensor) -> Tensor:
        """Return the values that the kernels' float32 output stands for: here these themselves."""
        return out

    # ---- packing ----------------------------------------------------------------------------------------------------

    def _pack(self, folded: FoldedConvMixer, kernel_size: int) -> ModelRecord:
        """Pack a model: fill a record with its sizes and the addresses of packed weights."""
        stem: Any = folded.stem[0]
        blocks: list[Any] = list(folded.blocks)
        dim, inputs = stem.out_channels, stem.weight[0].numel()
        padded = -(-inputs // 32) * 32
        weight = nn.functional.pad(stem.weight.reshape(dim, inputs).contiguous(), (0, padded - inputs))
        norms = [*(block.norm for block in blocks), None]
        records = (BlockRecord * len(blocks))()
        for i, (record, block) in enumerate(zip(records, blocks, strict=True)):
            self._fill_block(record, block, norms[i + 1], i)
        return ModelRecord(
            dim=dim,
            depth=len(blocks),
            kernel_size=kernel_size,
            patch_size=folded.patch_size,
            in_chans=folded.in_chans,
            relu=isinstance(folded.stem[1], nn.ReLU),
            stem_inputs=padded,
            amx=self._amx,
            stem=self._address(self._pack_matrix(weight)),
            stem_end=self._epilogue(stem.bias, norms[0]),
            blocks=records,
        )

    def _fill_block(self, record: BlockRecord, block: Any, next_norm: Any, index: int) -> None:
        """Fill the record of the block of this index.

        `next_norm` is what folding left of the BatchNorm after it; None: nothing.
        """
        dim = len(block.gain)
        record.kernel = self._address(self._pack_kernels(block.depthwise.weight[:, 0]))
        record.bias = self._address(self._pack_channels(block.depthwise.bias[:, None]))
        record.gain = self._address(self._pack_channels(block.gain.reshape(dim, 1)))
        record.pointwise = self._address(self._pack_matrix(block.pointwise.weight.reshape(dim, dim)))
        record.end = self._epilogue(block.pointwise.bias, next_norm)

    def _epilogue(self, bias: Tensor, norm: Any) -> AffineRecord:
        """Pack the bias of a convolution, and what folding left of the BatchNorm after its activation."""
        return AffineRecord(*(self._address(tensor) for tensor in (bias, *scale_and_shift(norm, bias))))

    def _address(self, tensor: Tensor) -> int:
        """Return the address of a contiguous copy, which lives as long as this object."""
        # A copy, because a parameter moves when the model is sent to another process.
        self._packed_tensors.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return int(self._packed_tensors[-1].data_ptr())

    def _pack_kernels(self, weight: Tensor) -> Tensor:
        """Pack depthwise kernels (dim, k, k).

        On tiles as (dim, k, 16), each row reversed and followed by zeros; else as `_pack_channels`.
        """
        if self.planar:
            return nn.functional.pad(weight.flip(2), (0, 16 - weight.shape[2])).to(torch.bfloat16)
        return self._pack_channels(weight.flatten(1))

    def _pack_channels(self, values: Tensor) -> Tensor:
        """Pack n float32 values of each channel, (dim, n).

        On tiles as they are; else as (dim/32, n, 2, 16), two registers of 16 channels: the lower and the upper ones, or
        in bfloat16 the even and the odd ones.
        """
        if self.planar:
            return values
        if self.dtype == torch.bfloat16:
            return rearrange(values, "(groups lane two) n -> groups n two lane", lane=16, two=2)
        return rearrange(values, "(groups two lane) n -> groups n two lane", lane=16, two=2)

    def _pack_matrix(self, weight: Tensor) -> Tensor:
        """Pack the weights of a matrix multiplication, (outputs, inputs).

        In bfloat16 on tiles as (outputs/16, inputs/32, 16, 32), which `cpu_tiles.h` reads; in float32 on tiles as pairs
        of inputs in three bfloat16 parts, (outputs/32, inputs/32, 3, 2, 16, 16, 2), which `cpu.cpp` reads. Else as
        (outputs/PANEL, inputs, PANEL), in bfloat16 as pairs of inputs, (outputs/PANEL, inputs/2, PANEL, 2).
        """
        if self.planar:
            return rearrange(weight.to(torch.bfloat16), "(o row) (i column) -> o i row column", row=16, column=32)
        if self._amx:
            order = "part (o tile column) (i row two) -> o i part tile row column two"
            return rearrange(torch.stack(_three_bfloat16(weight)), order, tile=2, column=16, row=16, two=2)
        if self.dtype == torch.bfloat16:
            return rearrange(weight.to(torch.bfloat16), "(o panel) (i two) -> o i panel two", panel=PANEL, two=2)
        return rearrange(weight, "(o panel) i -> o i panel", panel=PANEL)


def _three_bfloat16(x: Tensor) -> list[Tensor]:
    """Split a float32 tensor into three bfloat16 tensors, the largest first, whose sum it is exactly."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts


def scale_and_shift(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return what folding left of a BatchNorm, (dim,) each and like `like`; ones and zeros where it left nothing."""
    scale = torch.ones_like(like) if norm is None or norm.scale is None else norm.scale.flatten()
    return scale, torch.zeros_like(like) if norm is None else norm.shift.flatten()
