"""What `optimize` asks of a backend. Each backend answers in a file of its own.

`choose.py` asks a `Backend` in this order: does it compute this type on this device (`unsupported`), is what it needs
installed (`missing`), does it take this model (`refuses`)? Then it makes what all chunk sizes share (`prepare`), and
from that a `Runtime` for one chunk size (`build`).
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from convmixer.errors import missing
from convmixer.hardware import bf16_is_faster, l2_cache
from convmixer.model import ConvMixer
from convmixer.runtime.chunks import ChunkRule, FittingChunk, FixedChunk
from convmixer.runtime.folding import FoldedConvMixer, find_convmixer, fold

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Choice:
    """What `optimize` chose, and why.

    Attributes:
        backend: One of `BACKENDS`, but not "auto".
        dtype: Type that it computes in, such as "bfloat16".
        device: Device that it computes on.
        layout: "channels_last" or "contiguous" activations; "own" where the runtime decides.
        threads: Threads that compute one call; 0 on a GPU.
        chunks: How batches are split, in words.
        reason: Why it was chosen, in words.
    """

    backend: str
    dtype: str
    device: str
    layout: str
    threads: int
    chunks: str
    reason: str

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        how = f"{self.dtype} on {self.device}, {self.layout} layout{threads}, {self.chunks}"
        return f"{self.backend}, {how}: {self.reason}"


class Runtime(Protocol):
    """A model that a backend has built. Several threads may call it.

    When it is copied, pickled or sent to another process, it is built again from what it was built from.
    """

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the outputs for images (B, C, H, W), in the type of the folded model."""

    def after_fork(self) -> None:
        """Make it usable in a forked child process, where the parent's threads are gone."""


@dataclass(frozen=True)
class Request:
    """What the caller of `optimize` asked for, and what every backend derives from it.

    Attributes:
        model: Out of its wrappers: a `ConvMixer`, or timm's feature extractor around one.
        dtype: Type to compute in; int8 for the convolutions.
        threads: For the backends that have threads of their own.

    The other attributes are arguments of `optimize`.
    """

    model: nn.Module
    normalization: bool
    dtype: torch.dtype
    threads: int
    calibration: Tensor | str | Path | None
    graphs: bool | Literal["auto"]

    @property
    def convmixer(self) -> ConvMixer:
        return find_convmixer(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.convmixer.parameters()).device

    @property
    def float_dtype(self) -> torch.dtype:
        """Type of whatever is not quantized."""
        if self.dtype != torch.int8:
            return self.dtype
        return torch.bfloat16 if bf16_is_faster(self.device) else torch.float32

    @property
    def precision(self) -> str:
        """What it computes in, for people."""
        name = dtype_name(self.float_dtype)
        return f"int8 and {name}" if self.dtype == torch.int8 else name

    def fitting_chunk(self) -> FittingChunk:
        """Return the rule for chunks that fill a core's cache."""
        return FittingChunk(self.convmixer.dim, self.convmixer.patch_size, self.float_dtype.itemsize)

    def chunk_rule(self, chunk: int | None) -> ChunkRule | None:
        """Return the rule of a chunk size that was asked for or else fits; None for whole batches, as on a GPU."""
        if chunk:
            return FixedChunk(chunk)
        return self.fitting_chunk() if self.device.type == "cpu" else None

    def describe_chunks(self, chunk: int | None) -> str:
        """Describe how batches are split, for people."""
        if chunk:
            return f"chunks of at most {chunk} images"
        on_cpu = self.device.type == "cpu"
        return f"chunks that fill {l2_cache() // 1024:,} KiB of cache" if on_cpu else "whole batches"


@dataclass(frozen=True)
class Prepared:
    """What runtimes of one backend share, whatever their chunk size.

    Attributes:
        folded: The `FoldedConvMixer`, or timm's feature extractor around one.
        program: What the backend made of it, such as an OpenVINO model.
    """

    folded: Any
    program: Any = None


@dataclass(frozen=True)
class Built:
    """A runtime, and what it says about itself in a `Choice`."""

    runtime: Runtime
    layout: str
    threads: int
    chunks: str


class Backend(ABC):
    """Everything that is known about one backend.

    Attributes:
        name: As in `optimize(backend=...)`.
        splits_batches: Whether it takes chunks of images; otherwise it computes single images.
    """

    name: ClassVar[str]
    splits_batches: ClassVar[bool] = True

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        """Say what is not installed, and how to get it; None if everything is there."""
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Say why this backend does not compute in this type on this device; None if it does."""
        return None

    def refuses(self, model: nn.Module, dtype: torch.dtype) -> str | None:
        """Say why this backend does not take this model; None if it does."""
        return None

    def trial(self, device: torch.device) -> None:
        """Raise a DependencyError where only the first call of a runtime would fail."""
        return None

    def chunks_to_time(self, request: Request, example: Tensor) -> Sequence[int | None]:
        """Return the chunk sizes worth timing for images: around the one that fits the cache, and one per thread."""
        if request.device.type != "cpu":
            return (len(example),)
        fitting = request.fitting_chunk()(*example.shape[2:])
        share = -(-len(example) // request.threads)
        return sorted({min(chunk, share) for chunk in (max(fitting // 2, 1), fitting, 2 * fitting, share)})

    @abstractmethod
    def prepare(self, request: Request) -> Prepared:
        """Fold the model, and make of it what runtimes of all chunk sizes share."""

    @abstractmethod
    def build(self, request: Request, prepared: Prepared, chunk: int | None) -> Built:
        """Make a runtime that computes at most `chunk` images at a time; None: as many as suit the machine."""


class CpuBackend(Backend):
    """A backend that computes on the CPU only, outside PyTorch, with threads of its own."""

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"backend={self.name!r} computes on the CPU, this model is on {device}: call model.cpu() first"
        return self.unsupported_dtype(dtype)

    @abstractmethod
    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        """Say why this processor does not compute in this type; None if it does."""

    def prepare(self, request: Request) -> Prepared:
        # float16 has the smallest range, which decides what may be folded.
        dtype = torch.float16 if request.dtype == torch.float16 else torch.float32
        divide = request.dtype != torch.int8
        folded: Any = fold(request.model, request.normalization, dtype, divide=divide).float()
        return Prepared(folded, self.convert(request, folded))

    @abstractmethod
    def convert(self, request: Request, folded: FoldedConvMixer) -> Any:
        """Make the backend's own form of a model folded in float32."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def missing_modules(what: str, modules: Sequence[str], extra: str) -> str | None:
    """Say which modules are not installed, and which extra brings them; None if all are."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return missing(what, absent, extra) if absent else None
