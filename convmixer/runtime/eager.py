"""The backend "eager", a module as PyTorch computes it, and what the other backends in PyTorch share with it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convmixer.ops import prefers_channels_last
from convmixer.runtime.chunks import ChunkRule, SharedChunk, as_list, join_chunks
from convmixer.runtime.cuda_graphs import GRAPH_BYTES, Compute, Replayed, SmallFeatureMaps
from convmixer.runtime.folding import fold
from convmixer.runtime.protocol import Backend, Built, Prepared, Request, Runtime
from convmixer.wrappers import find_inner


def _run(compute: Compute, owned: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Compute; `owned` is only held on to."""
    return compute(x)


class Eager:
    """A module as it is, a chunk at a time. PyTorch's own threads share each chunk.

    Args:
        module: In evaluation mode.
        chunk_rule: Images in a chunk; None: whole batches.
    """

    def __init__(self, module: nn.Module, chunk_rule: ChunkRule | None = None) -> None:
        self.module, self.chunk_rule = module, chunk_rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.chunk_rule)

    def after_fork(self) -> None:
        """Do nothing: PyTorch looks after its own threads."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return join_chunks([self.compute(chunk) for chunk in self.split(x)])

    def bind(self, x: Tensor) -> Compute:
        """Return what computes images of this shape, and owns the weights that it reads: see `Replayed`."""
        owned = [t.detach() for t in itertools.chain(self.module.parameters(), self.module.buffers())]
        return partial(_run, self, owned)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Split images (B, C, H, W) into chunks."""
        chunks: Sequence[Tensor] = x.split(len(x) if self.chunk_rule is None else self.chunk_rule(*x.shape[2:]))
        return chunks

    def compute(self, x: Tensor) -> list[Tensor]:
        """Compute the outputs of one chunk."""
        return as_list(self.module(x))


class EagerBackend(Backend):
    """A folded module on any device."""

    name = "eager"
    runtime: ClassVar[type[Eager]] = Eager

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.int8:
            return f"dtype={dtype}: give a floating point type such as torch.bfloat16, or backend='auto' with it"
        return None

    def prepare(self, request: Request) -> Prepared:
        folded = fold(request.model, request.normalization, request.dtype)
        kernel_size = find_inner(folded).blocks[0].depthwise.kernel_size[0]
        find_inner(folded).channels_last = prefers_channels_last(request.device, request.dtype, kernel_size)
        return Prepared(folded)

    def build(self, request: Request, prepared: Prepared, chunk: int | None) -> Built:
        chunk_rule, threads = request.chunk_rule(chunk), 0
        if request.device.type == "cpu":
            threads = torch.get_num_threads()
            chunk_rule = chunk_rule and SharedChunk(chunk_rule)
        eager = self.runtime(prepared.folded, chunk_rule)
        runtime: Runtime = eager
        if request.graphs and request.device.type == "cuda":
            inner = find_inner(prepared.folded)
            most = sys.maxsize if request.graphs is True else GRAPH_BYTES
            worth = SmallFeatureMaps(inner.num_features, inner.patch_size, most)
            runtime = Replayed(eager, worth, bind=eager.bind)
        chunks = request.describe_chunks(chunk and chunk * max(threads, 1))
        return Built(runtime, self.layout(prepared.folded), threads, chunks)

    def layout(self, folded: nn.Module) -> str:
        return "channels_last" if find_inner(folded).channels_last else "contiguous"
