"""How a batch is cut up for the cache of a core, and compiled graphs by shape."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convmixer.hardware import l2_cache

GRAPHS_KEPT = 32  # compiled graphs per model, one for each shape; the one unused for longest goes first


def _power_of_two(number: int) -> int:
    """The largest one that is not above the number."""
    return 1 << (max(number, 1).bit_length() - 1)


def pieces(batch: int, chunk: int, threads: int) -> list[int]:
    """Sizes into which a batch is cut: at most `chunk`, enough for all threads, few different ones.

    What is left after the pieces of the largest size comes in powers of two, so that few graphs serve all batches.
    """
    share = -(-batch // threads)
    most = chunk if chunk <= share else _power_of_two(share)
    sizes = [most] * (batch // most)
    rest = batch % most
    while rest:
        sizes.append(_power_of_two(rest))
        rest -= sizes[-1]
    return sizes


def fitting_chunk(dim: int, positions: int, itemsize: int) -> int:
    """Images whose activations (dim, positions) fill a core's second-level cache: a power of two."""
    return _power_of_two(l2_cache() // (dim * positions * itemsize))


Turn = Callable[[], contextlib.AbstractContextManager[Any]]


class _Graphs:
    """Compiled graphs by key, made once each whichever thread asks first; the one unused for longest is dropped.

    Args:
        make: From key to graph.
        turn: What a thread holds while it makes one; None: a lock of this object's own.
    """

    def __init__(self, make: Callable[..., Any], turn: Turn | None = None) -> None:
        making = threading.Lock()
        self._make, self._turn = make, turn or (lambda: making)
        self._kept, self._lock = OrderedDict[Any, Any](), threading.Lock()

    def __call__(self, *key: Any) -> Any:
        graph = self._find(key)
        if graph is None:
            with self._turn():
                graph = self._find(key)
                if graph is None:
                    graph = self._make(*key)
                    with self._lock:
                        self._kept[key] = graph
                        if len(self._kept) > GRAPHS_KEPT:
                            self._kept.popitem(last=False)
        return graph

    def _find(self, key: Any) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]


def _join(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The outputs of several pieces, as those of one batch."""
    return list(parts[0]) if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


Rule = Callable[[int, int], int]  # height and width of images -> chunk


@dataclass(frozen=True)
class _Fixed:
    """The rule of one chunk for all sizes."""

    chunk: int

    def __call__(self, height: int, width: int) -> int:
        return self.chunk


@dataclass(frozen=True)
class _Fitting:
    """The rule of `fitting_chunk`."""

    dim: int
    patch_size: int
    itemsize: int

    def __call__(self, height: int, width: int) -> int:
        positions = (height // self.patch_size) * (width // self.patch_size)
        return fitting_chunk(self.dim, positions, self.itemsize)


@dataclass(frozen=True)
class _Together:
    """The rule of pieces that PyTorch's threads share: as many times as large as there are threads."""

    rule: Rule

    def __call__(self, height: int, width: int) -> int:
        return self.rule(height, width) * torch.get_num_threads()


@dataclass(frozen=True)
class _Small:
    """Whether a feature map of images has at most so many bytes."""

    dim: int
    patch_size: int
    most: int

    def __call__(self, x: Tensor) -> bool:
        batch, _, height, width = x.shape
        positions = (height // self.patch_size) * (width // self.patch_size)
        return batch * self.dim * positions * x.element_size() <= self.most
