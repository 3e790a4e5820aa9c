"""A stand-in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def _tensors(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Tape(TorchDispatchMode):
    """Records each operation with the memory that it reads and writes, and with numbers as they are now."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: what was there, and what it held

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a number during a capture")
        for tensor in _tensors(args, kwargs):
            if _memory(tensor) not in self.made:
                self.before.setdefault(_memory(tensor), (tensor, tensor.clone()))
        result = operation(*args, **kwargs)
        self.made |= {_memory(tensor) for tensor in _tensors(result)} - self.before.keys()
        keep = tree_map(lambda leaf: leaf, (args, kwargs))  # lists may be changed later
        self.operations.append((operation, *keep, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.operations:
            for kept, new in zip(_tensors(result), _tensors(operation(*args, **kwargs)), strict=True):
                if _memory(kept) != _memory(new):
                    kept.copy_(new)


class Tapes:
    """`Graphs` of operations of PyTorch, which run again on the same memory, as the kernels of a CUDA graph do."""

    def __init__(self, _device: object = None) -> None:
        self.tapes: list[_Tape] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        tape, state = _Tape(), torch.get_rng_state()
        try:
            with tape:
                function()
        finally:  # a capture runs nothing
            tape.undo()
            torch.set_rng_state(state)
        self.tapes.append(tape)
        return tape.replay
