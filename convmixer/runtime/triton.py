"""The backend "triton": a folded model in this package's own kernels for CUDA devices."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from convmixer.native.compiled_code import settle
from convmixer.ops.limits import ACTIVATIONS, DTYPES, KERNEL_SIZES, unsupported
from convmixer.runtime.chunks import ChunkRule
from convmixer.runtime.eager import Eager, EagerBackend
from convmixer.runtime.folding import find_convmixer
from convmixer.runtime.protocol import CPU


class Triton(Eager):
    """A folded model whose blocks are two kernels each, of `convmixer.ops.triton`, on a CUDA device.

    What is left of a block's BatchNorm in front of it is added at the end of the block before.
    """

    def __init__(self, module: Any, chunk_rule: ChunkRule | None = None) -> None:
        super().__init__(module, chunk_rule)
        home = os.environ.get("TRITON_HOME")
        settle("TRITON_CACHE_DIR", lambda: str(Path(home or Path.home(), ".triton", "cache")), "Triton's kernels")
        from convmixer.ops.triton import launch  # imports triton

        self._depthwise, self._pointwise = launch.depthwise_infer, launch.pointwise_infer
        self._blocks: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []  # arguments of both kernels
        blocks = list(module.blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            # Channels lie next to each other, as the kernel reads them: it then copies nothing.
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

    def compute(self, x: Tensor) -> list[Tensor]:
        folded: Any = self.module
        x = folded.stem(x).contiguous(memory_format=torch.channels_last)
        x = folded.blocks[0].norm(x)
        for (weight, bias, act, gain), pointwise in self._blocks:
            x = self._depthwise(x, weight, bias, act, gain, None, x)
            x = self._pointwise(x, *pointwise)
        return [folded.classify(x)]


class TritonBackend(EagerBackend):
    """Own kernels on CUDA devices; on a CPU in Triton's interpreter, for tests."""

    name = "triton"
    runtime = Triton

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton needs triton on a GPU, which is missing: pip install triton"
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
            return f"backend='triton' computes on CUDA devices, this model is on {device}: call model.cuda() first"
        if device.type == "cuda" and torch.cuda.is_available() and (lacking := unsupported(device)):
            return f"backend='triton': {lacking}; use compile"
        if dtype not in DTYPES:
            return f"dtype={dtype}: triton computes in bfloat16, float16 or float32"
        return None

    def refuses(self, model: nn.Module, dtype: torch.dtype) -> str | None:
        if isinstance(model, FeatureGetterNet):
            return "triton returns only the last output: use another backend for features_only, such as compile"
        blocks: Any = find_convmixer(model).blocks
        for block in blocks:
            depthwise, first, _ = block[0].fn
            if depthwise.kernel_size[0] not in KERNEL_SIZES:
                valid = f"{KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
                return f"triton computes kernels of {valid}, this model has {depthwise.kernel_size[0]}: use compile"
            for act in (first, block[2]):
                if type(act) not in ACTIVATIONS or getattr(act, "approximate", "none") != "none":
                    return f"triton computes {', '.join(ACTIVATIONS.values())}, this model has {act}: use compile"
        return None

    def layout(self, folded: nn.Module) -> str:
        return "channels_last"
