"""A folded model in this package's own kernels for CUDA devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmixer.native.compiled_code import settle
from convmixer.ops.fused import ACTIVATIONS
from convmixer.runtime.chunks import Rule
from convmixer.runtime.eager import Whole


class Triton(Whole):
    """A folded model whose blocks are two kernels each, of `convmixer.ops.triton`, on a CUDA device.

    What is left of a block's BatchNorm in front of it is added at the end of the block before.
    """

    def __init__(self, module: Any, rule: Rule | None = None) -> None:
        super().__init__(module, rule)
        home = os.environ.get("TRITON_HOME")
        settle("TRITON_CACHE_DIR", lambda: str(Path(home or Path.home(), ".triton", "cache")), "Triton's kernels")
        from convmixer.ops.triton import launch  # imports triton

        self._depthwise, self._pointwise = launch.depthwise_infer, launch.pointwise_infer
        self._blocks: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
        blocks = list(module.blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            # Channels side by side, as the kernel reads them: it then copies nothing.
            weight = block.depthwise.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
            norm = [None, None] if following is None else [following.norm.scale, following.norm.shift]
            vectors = (block.depthwise.bias, block.gain, block.pointwise.bias, *norm)
            first, gain, second, scale, shift = (v if v is None else v.flatten().float() for v in vectors)
            self._blocks.append(
                (
                    (weight, first, ACTIVATIONS[type(block.act)], gain),
                    (block.pointwise.weight.flatten(1), second, ACTIVATIONS[type(block.last_act)], scale, shift),
                )
            )

    def _run(self, x: Tensor) -> list[Tensor]:
        folded: Any = self.module
        x = folded.stem(x).contiguous(memory_format=torch.channels_last)
        x = folded.blocks[0].norm(x)
        for (weight, bias, act, gain), product in self._blocks:
            x = self._depthwise(x, weight, bias, act, gain, None, x)
            x = self._pointwise(x, *product)
        if folded.global_pool.pool_type in ("avg", "fastavg"):
            x = x.mean((2, 3), keepdim=True)  # a mean commutes with the last BatchNorm
        return [folded.forward_head(folded.norms[-1](x))]
