"""This package's own kernels for x86 CPUs: `csrc/`, compiled once for the machine, and a model packed for them.

The library is compiled with the C++ compiler at hand, when it is first needed, and kept in `$XDG_CACHE_HOME/convmixer`
(`~/.cache/convmixer`) under a name made of source, compiler and processor, with a checksum. One that is damaged is
compiled anew; where nothing can be kept or run from there, it is compiled for the process alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmixer.errors import DependencyError
from convmixer.hardware import cpu_field, cpu_name
from convmixer.hub.checkpoints import write_atomically
from convmixer.native.compiled_code import instead_of, unusable

if TYPE_CHECKING:
    from convmixer.runtime.folding import FoldedConvMixer

SOURCES = [Path(__file__).parent / "csrc" / name for name in ("cpu.cpp", "cpu.h", "cpu_tiles.h", "cpu_bytes.h")]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PANEL = 64  # output channels that are packed together; PANEL in cpu.cpp
LARGEST = 15  # kernel size on tiles; LARGEST in cpu_tiles.h
LARGEST_BYTES = 13  # kernel size in int8; LARGEST_BYTES in cpu_bytes.h
_SUM_SIZE = 32
_COMPILING = threading.Lock()
MARGIN = 1.15  # by which int8 goes beyond what calibration images span: saturation costs more than coarser steps


def compiler() -> str | None:
    """Path of the C++ compiler: CXX, else g++ or clang++; None if there is none."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def inductor_lacks(device: torch.device) -> str | None:
    """What `torch.compile` needs on a device and does not find, and how to get it; None if nothing."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # which will call another one than `compiler` may find

        try:
            found = get_cpp_compiler() if "CXX" not in os.environ else compiler()
        except Exception:
            found = None
        if not found:
            return "needs a C++ compiler on a CPU, and there is none: install g++, or name a compiler in CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "needs triton on a GPU, which is missing: pip install triton"
    return None


def refusal(model: Any, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take a model, a `ConvMixer`, in a type; None if they do."""
    act, kernel_size = model.stem[1], model.blocks[0][0].fn[0].kernel_size[0]
    if model.dim % PANEL:
        return f"native takes models whose dim is a multiple of {PANEL}, this one has {model.dim}"
    if type(act) not in (nn.GELU, nn.ReLU) or getattr(act, "approximate", "none") != "none":
        return f"native takes the activations gelu and relu, this model has {act}"
    if dtype == torch.int8 and kernel_size > LARGEST_BYTES:
        return f"native takes kernels of at most {LARGEST_BYTES} in int8, this model has {kernel_size}"
    return None


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The compiled kernels; a DependencyError if they cannot be compiled, or kept and run nowhere."""
    with _COMPILING:
        loaded = _find()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name in ("float32", "bfloat16", "int8"):
        function = getattr(loaded, f"convmixer_{name}", None)
        if function is None:  # this processor has no int8 tiles
            continue
        function.argtypes = [pointer, pointer, number, number, number, pointer, number, number]
        function.restype = number
    return loaded


def _find() -> Any:
    """The library from the cache, else compiled and put there, else compiled for this process alone."""
    path = compiler()
    if path is None:
        raise DependencyError("native needs a C++ compiler, and there is none: install g++, or name one in CXX")
    if not torch.cpu._is_avx512_supported():
        raise DependencyError("native needs a CPU with AVX-512: choose another backend, such as openvino")
    texts = [source.read_text(encoding="utf-8") for source in SOURCES]
    content = "\n".join([*texts, _run(path, "--version").stdout, cpu_name(), cpu_field("flags"), *FLAGS])
    name = f"native-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    binary = None
    try:
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convmixer" / name
        binary = _read(file)
        if binary is not None:
            return ctypes.CDLL(str(file))
        reason = unusable(file.parent)
        if reason is None:
            binary = _compile(path)
            return _put(binary, file)
    except (OSError, RuntimeError) as error:  # nothing can be read, written or run there; no home
        reason = str(error)
    return _put(binary or _compile(path), instead_of(reason, "native kernels", "XDG_CACHE_HOME") / name)


def _put(binary: bytes, file: Path) -> Any:
    write_atomically(file, lambda temporary: temporary.write_bytes(binary))
    return ctypes.CDLL(str(file))


def _run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DependencyError(f"{path} cannot be run ({error.strerror}): name another compiler in CXX") from error


def _read(file: Path) -> bytes | None:
    """A library with its checksum behind it, where a linker does not look; None if it is not there, or damaged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    return content if _sum(content[:-_SUM_SIZE]) == content[-_SUM_SIZE:] else None


def _sum(binary: bytes) -> bytes:
    return hashlib.sha256(binary).digest()


def _compile(path: str) -> bytes:
    """The library as `_read` takes it."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "native.so"
        run = _run(path, *FLAGS, "-o", str(made), str(SOURCES[0]))
        if run.returncode or not made.exists():
            lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise DependencyError(
                f"{path} cannot compile the native kernels ({lines[0] if lines else 'no message'}): "
                "name another compiler in CXX, or choose another backend"
            )
        binary = made.read_bytes()
    return binary + _sum(binary)


def _three_bfloat16(x: Tensor) -> list[Tensor]:
    """Three tensors in bfloat16 whose sum is the float32 tensor exactly."""
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts


def _scale_and_shift(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(dim,) each, of what is left of a BatchNorm; ones and zeros where there is none."""
    scale = torch.ones_like(like) if norm is None or norm.scale is None else norm.scale.flatten()
    return scale, torch.zeros_like(like) if norm is None else norm.shift.flatten()


class _Affine(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("bias", "scale", "shift")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "bias", "gain", "pointwise")),
        ("end", _Affine),
        ("tables", ctypes.c_void_p * 2),
        ("zeros", ctypes.c_void_p),
        ("lifts", ctypes.c_void_p),
    ]


_NUMBERS = ("dim", "depth", "kernel_size", "patch_size", "in_chans", "relu", "stem_inputs", "amx")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("stem", ctypes.c_void_p),
        ("stem_end", _Affine),
        ("blocks", ctypes.POINTER(_Block)),
        ("last", ctypes.c_void_p),
    ]


class Native:
    """A folded model in the native kernels. Images go to the threads one each; what is left over they share.

    Args:
        folded: In float32 on the CPU.
        dtype: float32 or bfloat16: of activations and weights. Sums are float32.
        threads: Number of them.
    """

    def __init__(self, folded: FoldedConvMixer, dtype: torch.dtype, threads: int) -> None:
        self.folded, self.dtype, self.threads = folded, dtype, threads
        self._library = library()
        if dtype == torch.int8 and not (hasattr(self._library, "convmixer_int8") and self._library.convmixer_amx()):
            raise DependencyError(
                "native computes int8 on AMX, which this compiler does not know or this system does not permit: "
                "choose openvino, or name another compiler in CXX"
            )
        self._run = getattr(self._library, f"convmixer_{str(dtype).removeprefix('torch.')}")
        self._kept: list[Any] = []  # what the record points to
        stem: Any = folded.stem[0]
        blocks: list[Any] = list(folded.blocks)
        dim, kernel_size = stem.out_channels, blocks[0].depthwise.kernel_size[0]
        self._amx = bool(self._library.convmixer_amx()) and (dtype == torch.float32 or kernel_size <= LARGEST)
        inputs = stem.weight[0].numel()
        padded = -(-inputs // 32) * 32
        weight = nn.functional.pad(stem.weight.reshape(dim, inputs).contiguous(), (0, padded - inputs))
        norms = [*(block.norm for block in blocks), None]
        records = (_Block * len(blocks))()
        for i, (record, block) in enumerate(zip(records, blocks, strict=True)):
            self._fill(record, block, norms[i + 1], i)
        self._record = _Model(
            dim=dim,
            depth=len(blocks),
            kernel_size=kernel_size,
            patch_size=folded.patch_size,
            in_chans=folded.in_chans,
            relu=isinstance(folded.stem[1], nn.ReLU),
            stem_inputs=padded,
            amx=self._amx,
            stem=self._keep(self._packed(weight)),
            stem_end=self._end(stem.bias, norms[0]),
            blocks=records,
        )

    def after_fork(self) -> None:
        """In a child by fork OpenMP would wait for threads that are gone."""
        self.threads = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are packed anew: a record holds addresses."""
        return type(self), (self.folded, self.dtype, self.threads)

    def _fill(self, record: Any, block: Any, norm: Any, _: int) -> None:
        """The record of a block; `norm` is the next one's."""
        dim = len(block.gain)
        record.kernel = self._keep(self._kernels(block.depthwise.weight[:, 0]))
        record.bias = self._keep(self._registers(block.depthwise.bias[:, None]))
        record.gain = self._keep(self._registers(block.gain.reshape(dim, 1)))
        record.pointwise = self._keep(self._packed(block.pointwise.weight.reshape(dim, dim)))
        record.end = self._end(block.pointwise.bias, norm)

    def _keep(self, tensor: Tensor) -> int:
        # A copy: what is a parameter's own moves when the model is sent to another process.
        self._kept.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return int(self._kept[-1].data_ptr())

    @property
    def planar(self) -> bool:
        """Whether activations are planar, computed by tiles; else channels-last."""
        return self._amx and self.dtype != torch.float32

    def _kernels(self, weight: Tensor) -> Tensor:
        """(dim, k, k) -> on tiles (dim, k, 16), reversed rows with zeros behind; else in the order of registers."""
        if self.planar:
            return nn.functional.pad(weight.flip(2), (0, 16 - weight.shape[2])).to(torch.bfloat16)
        return self._registers(weight.flatten(1))

    def _registers(self, values: Tensor) -> Tensor:
        """(dim, n) -> (dim/32, n, 2, 16): two registers of 16 channels; in bfloat16 even channels and odd ones."""
        if self.planar:
            return values
        if self.dtype == torch.bfloat16:
            return values.reshape(len(values) // 32, 16, 2, -1).permute(0, 3, 2, 1)
        return values.reshape(len(values) // 32, 2, 16, -1).permute(0, 3, 1, 2)

    def _packed(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) -> tiles as cpu_tiles.h and `product_split` read them, else (outputs/PANEL, inputs, PANEL).

        In the latter two inputs lie side by side in bfloat16.
        """
        outputs, inputs = weight.shape
        if self.planar:
            return weight.to(torch.bfloat16).reshape(outputs // 16, 16, inputs // 32, 32).permute(0, 2, 1, 3)
        if self._amx:
            tiles = torch.stack(_three_bfloat16(weight)).reshape(3, outputs // 32, 2, 16, inputs // 32, 16, 2)
            return tiles.permute(1, 4, 0, 2, 5, 3, 6)
        if self.dtype == torch.bfloat16:
            pairs = weight.to(torch.bfloat16).reshape(outputs // PANEL, PANEL, inputs // 2, 2)
            return pairs.permute(0, 2, 1, 3)
        return weight.reshape(outputs // PANEL, PANEL, inputs).permute(0, 2, 1)

    def _end(self, bias: Tensor, norm: Any) -> _Affine:
        """Bias of a convolution, and what is left of the BatchNorm after its activation."""
        return _Affine(*(self._keep(tensor) for tensor in (bias, *_scale_and_shift(norm, bias))))

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = x.detach().float().contiguous()
        batch, _, height, width = x.shape
        pooled = self.folded.global_pool.pool_type in ("avg", "fastavg")
        patch = self.folded.patch_size
        places: Sequence[int] = () if pooled else (height // patch, width // patch)
        dim = self._record.dim
        out = torch.empty(batch, dim, *places) if self.planar else torch.empty(batch, *places, dim)
        images, result = x.data_ptr(), out.data_ptr()
        if not self._run(ctypes.byref(self._record), images, batch, height, width, result, pooled, self.threads):
            raise MemoryError(f"too little memory for images of {height} x {width}")
        out = self._shifted(out)
        features = out[:, :, None, None] if pooled else out if self.planar else out.permute(0, 3, 1, 2)
        with torch.no_grad():
            return [self.folded.forward_head(self.folded.norms[-1](features))]

    def _shifted(self, out: Tensor) -> Tensor:
        return out


# ---- int8 -----------------------------------------------------------------------------------------------------------


Span = tuple[Tensor, Tensor]  # lowest and highest value of each channel, (dim,) each


@dataclass
class Ranges:
    """What a model's values span for calibration images.

    Attributes:
        x: The spans in each block of what is carried through it, and that of the last block's outputs.
        depthwise: Those of each block's depthwise convolution, before the activation.
        pointwise: The same of its 1x1 convolution.
    """

    x: list[Span]
    depthwise: list[Span]
    pointwise: list[Span]


def _span(*values: Tensor) -> Span:
    """Of values (B, dim, H, W)."""
    return _joined([(v.amin((0, 2, 3)), v.amax((0, 2, 3))) for v in values])


@torch.inference_mode()
def calibrate(folded: FoldedConvMixer, images: Tensor) -> Ranges:
    """Ranges of a model folded with `divide=False` for images (N, C, H, W)."""
    depth = len(folded.blocks)
    outputs: list[list[Span]] = [[] for _ in range(depth + 1)]  # per batch
    depthwise: list[list[Span]] = [[] for _ in range(depth)]
    pointwise: list[list[Span]] = [[] for _ in range(depth)]
    for batch in images.float().split(64):
        x = folded.stem(batch)
        for i, block in enumerate(folded.blocks):
            layers: Any = block
            x = layers.norm(x)
            c = layers.depthwise(x)
            z = torch.addcmul(x, layers.gain, layers.act(c))
            u = layers.pointwise(z)
            outputs[i].append(_span(x, z))
            depthwise[i].append(_span(c))
            pointwise[i].append(_span(u))
            x = layers.last_act(u)
        outputs[depth].append(_span(x))
    return Ranges(*([_joined(spans) for spans in found] for found in (outputs, depthwise, pointwise)))


def _joined(spans: list[Span]) -> Span:
    low, high = zip(*spans, strict=True)
    return torch.stack(low).amin(0), torch.stack(high).amax(0)


class NativeInt8(Native):
    """A folded model in int8: convolutions and activations, by tables. The patch embedding is in bfloat16.

    Args:
        folded: With `divide=False`, in float32 on the CPU.
        ranges: From `calibrate`.
        threads: Number of them.
    """

    def __init__(self, folded: FoldedConvMixer, ranges: Ranges, threads: int) -> None:
        self.ranges = ranges
        self._floor = 0.0 if isinstance(folded.stem[1], nn.ReLU) else -4.5  # where the activation has ended
        self._units = []
        for span, depthwise, block in zip(ranges.x, ranges.depthwise, folded.blocks, strict=False):
            residual = self._residual(block, self._values(depthwise)[0])
            taken, added = -residual.amin(1), residual.amax(1)
            self._units.append(_unit_and_zero(span, added < taken, torch.minimum(taken, added).clamp_min(0)))
        self._units.append(_unit_and_zero(ranges.x[-1], torch.tensor(False), torch.tensor(0.0)))
        super().__init__(folded, torch.int8, threads)
        norm: Any = folded.blocks[0].norm
        stem: Any = folded.stem[0]
        (scale, shift), (unit, zero) = _scale_and_shift(norm, stem.bias), self._units[0]
        values = (stem.bias, scale / unit, shift / unit + zero)
        self._record.stem_end = _Affine(*(self._keep(value) for value in values))
        self._record.last = self._keep(self._units[-1][0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folded, self.ranges, self.threads)

    def _fill(self, record: Any, block: Any, norm: Any, i: int) -> None:
        (unit, zero), (next_unit, next_zero) = self._units[i], self._units[i + 1]
        dim = len(unit)
        record.zeros = self._keep(zero.to(torch.uint8))
        weight, size = _int8(block.depthwise.weight[:, 0])
        record.kernel = self._keep(_runs(weight))
        bias = block.depthwise.bias - unit * size * zero * weight.sum((1, 2))
        record.gain, record.bias, values = self._index(unit * size, bias, self.ranges.depthwise[i])
        residual = self._residual(block, values) / unit[:, None]
        lift = (-residual.amin(1)).clamp(0, 255).ceil()
        record.lifts = self._keep(lift.to(torch.uint8))
        record.tables[0] = self._table(residual + lift[:, None])
        weight, size = _int8(block.pointwise.weight[:, :, 0, 0] * unit)
        record.pointwise = self._keep(weight.reshape(dim // 16, 16, dim // 64, 64).permute(0, 2, 1, 3))
        scale, shift = (value[:, None] for value in _scale_and_shift(norm, block.pointwise.bias))
        bias = block.pointwise.bias - size * (weight * zero).sum(1)
        record.end.scale, record.end.bias, values = self._index(size, bias, self.ranges.pointwise[i])
        outputs = scale * block.last_act(values) + shift
        record.tables[1] = self._table(outputs / next_unit[:, None] + next_zero[:, None])

    def _shifted(self, out: Tensor) -> Tensor:
        unit, zero = self._units[-1]
        return out - (unit * zero).reshape(-1, *[1] * (out.dim() - 2))

    @staticmethod
    def _residual(block: Any, values: Tensor) -> Tensor:
        """What a block adds to x, for outputs (dim, 256) of its depthwise convolution."""
        added: Tensor = block.gain.flatten()[:, None] * block.act(values)
        return added

    def _values(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        """256 values that an activation gets, (dim, 256); their lowest and the step from one to the next, (dim,)."""
        low = span[0].clamp_min(self._floor)
        step = (span[1] - low).clamp_min(1e-6) / 255
        return low[:, None] + step[:, None] * torch.arange(256), low, step

    def _index(self, unit: Tensor, bias: Tensor, span: Span) -> tuple[int, int, Tensor]:
        """Addresses of scale and offset, which make sums in `unit` an index; what each index stands for, (dim, 256)."""
        values, low, step = self._values(span)
        return self._keep(unit / step), self._keep((bias - low) / step - 128), values

    def _table(self, values: Tensor) -> int:
        """(dim, 256) -> address of bytes, in the order of the index as a signed byte seen as unsigned."""
        return self._keep(values.round().clamp(0, 255).to(torch.uint8).roll(-128, 1))


def _unit_and_zero(span: Span, negative: Tensor, lift: Tensor) -> tuple[Tensor, Tensor]:
    """What one step of a byte stands for, and which number stands for zero, (dim,) each.

    A sum must fit into the byte before `lift`, the least that the residual takes from x, is subtracted from it.
    """
    low, high = (MARGIN * value for value in (span[0].clamp(max=0), span[1].clamp(min=0)))
    unit = (high - low + lift).clamp_min(1e-6) / 255
    return torch.where(negative, -unit, unit), (torch.where(negative, high, -low) / unit).round().clamp(0, 255)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, ...) -> int8 values, and what one of them stands for, (outputs,)."""
    unit = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
    return (weight / unit.reshape(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), unit


def _runs(weight: Tensor) -> Tensor:
    """(dim, k, k) -> (dim, k, 16, 4): group i holds the reversed row's values i, i - 1, i - 2 and i - 3."""
    k = weight.shape[2]
    row = nn.functional.pad(weight.flip(2), (3, 16 - k))
    return torch.stack([row[..., 3 - j : 19 - j] for j in range(4)], -1)
