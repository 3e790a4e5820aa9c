"""A module as PyTorch computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convmixer.runtime.chunks import Rule, _join, as_list


class Whole:
    """A module as it is, a piece at a time. PyTorch's own threads share each piece.

    Args:
        module: In evaluation mode.
        rule: Images in a piece; None: all.
    """

    def __init__(self, module: nn.Module, rule: Rule | None = None) -> None:
        self.module, self.rule = module, rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.rule)

    def after_fork(self) -> None:
        """In a child by fork, nothing of this package's own is missing."""

    def _run(self, x: Tensor) -> list[Tensor]:
        return as_list(self.module(x))

    def __call__(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            chunk = len(x) if self.rule is None else self.rule(*x.shape[2:])
            return _join([self._run(part) for part in x.split(chunk)])
