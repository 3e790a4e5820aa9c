"""Into what chunks a batch is split.

What a block reads and writes should stay in the cache of the core that computes it, so a large batch is computed a
chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convmixer.hardware import l2_cache

ChunkRule = Callable[[int, int], int]  # height and width of images -> images in a chunk


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not above the number."""
    return 1 << (max(number, 1).bit_length() - 1)


def chunk_sizes(batch: int, largest: int, threads: int) -> list[int]:
    """Return the sizes into which a batch is split: at most `largest`, enough for all threads, few different ones.

    What is left after the chunks of the largest size comes in powers of two, so that few graphs serve all batches.
    """
    share = -(-batch // threads)
    size = largest if largest <= share else _power_of_two(share)
    sizes = [size] * (batch // size)
    remaining = batch % size
    while remaining:
        sizes.append(_power_of_two(remaining))
        remaining -= sizes[-1]
    return sizes


def fitting_chunk(dim: int, positions: int, itemsize: int) -> int:
    """Return how many images' activations (dim, positions) fill a core's second-level cache, as a power of two."""
    return _power_of_two(l2_cache() // (dim * positions * itemsize))


@dataclass(frozen=True)
class FixedChunk:
    """The rule that gives one chunk size for all image sizes."""

    chunk: int

    def __call__(self, height: int, width: int) -> int:
        return self.chunk


@dataclass(frozen=True)
class FittingChunk:
    """The rule of `fitting_chunk`."""

    dim: int
    patch_size: int
    itemsize: int

    def __call__(self, height: int, width: int) -> int:
        positions = (height // self.patch_size) * (width // self.patch_size)
        return fitting_chunk(self.dim, positions, self.itemsize)


@dataclass(frozen=True)
class SharedChunk:
    """The rule for chunks that PyTorch's threads share: as many times as large as there are threads."""

    per_thread: ChunkRule

    def __call__(self, height: int, width: int) -> int:
        return self.per_thread(height, width) * torch.get_num_threads()


def join_chunks(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Concatenate the outputs of several chunks to those of one batch."""
    return list(outputs[0]) if len(outputs) == 1 else [torch.cat(tensors) for tensors in zip(*outputs, strict=True)]


def as_list(outputs: Any) -> list[Tensor]:
    """Return what a model returned, one tensor or several, as a list."""
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
