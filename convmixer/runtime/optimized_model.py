"""The module that `optimize` returns."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.model import check_input
from convmixer.runtime.chunks import as_list
from convmixer.runtime.protocol import Choice, Runtime
from convmixer.tracing import computing
from convmixer.wrappers import find_inner

_AFTER_FORK = threading.Lock()
_KEEPS_ITS_WEIGHTS = "an optimized model keeps its weights: load others into the original, then optimize it"


class OptimizedConvMixer(nn.Module):
    """A model in the runtime that `optimize` chose. It answers as the original does, and faster.

    Images may be of any floating point type, and the outputs come in that type; autocast changes nothing. Several
    threads may call it. It can be copied, pickled, and sent to other processes, which build the runtime again; in a
    forked child process the backend "native" computes in one thread. Outputs carry no gradient. `num_classes`,
    `in_chans`, `num_features`, `head_hidden_size`, `feature_info` and `pretrained_cfg` are the original's.

    Attributes:
        choice: What was chosen, and why.
        folded: The `FoldedConvMixer`, or timm's feature extractor around one, in PyTorch: for export,
            `forward_features` and whatever else the runtime does not do.
        runtime: What computes the outputs.

    Raises:
        ArgumentError: From `train()`, `to()` another device or type, `load_state_dict()` (that of a module around it
            only if it brings other weights), or for images on another device or of an integer type.
        ImageError: Images that do not fit the model.
        DependencyError: From unpickling, where the runtime is not installed or the processor cannot compute it.
        ConvMixerError: On a GPU or with OpenVINO, in a forked child process.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> fast = convmixer.optimize(model, backend="auto")
        >>> fast(torch.rand(2, 3, 32, 32)).shape, fast.choice.dtype
        (torch.Size([2, 10]), 'float32')
    """

    def __init__(self, folded: nn.Module, runtime: Runtime, choice: Choice) -> None:
        super().__init__()
        self.folded, self.choice = folded, choice
        self.runtime = runtime
        inner: Any = find_inner(folded)
        self.num_classes, self.in_chans, self.num_features = inner.num_classes, inner.in_chans, inner.num_features
        self.head_hidden_size, self.patch_size = inner.head_hidden_size, inner.patch_size
        self.feature_info: Any = folded.feature_info
        self.pretrained_cfg: dict[str, Any] = inner.pretrained_cfg
        self._returns_list = folded is not inner
        self._process = os.getpid()
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | Any:
        if self._process != os.getpid():
            self._after_fork()
        with computing():
            return super().__call__(*args, **kwargs)

    def _after_fork(self) -> None:
        if self.choice.device.startswith("cuda"):
            raise ConvMixerError(
                "a model on a GPU cannot be used in a process that was forked: start it by spawn, as in "
                "DataLoader(multiprocessing_context='spawn')"
            )
        with _AFTER_FORK:
            if self._process != os.getpid():
                self.runtime.after_fork()
                self._process = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._process = os.getpid()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedConvMixer:
        own = next(self.folded.parameters())
        new = fn(own.detach()[:1])
        if (new.dtype, new.device) != (own.dtype, own.device):
            raise ArgumentError(
                f"an optimized model stays what it is, {self.choice.dtype} on {self.choice.device}: move or cast the "
                "original, then optimize it again"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error: the weights are part of what was compiled."""
        raise ArgumentError(_KEEPS_ITS_WEIGHTS)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *further: Any) -> None:
        """Raise an error for other weights: `load_state_dict` of a module around this one comes here."""
        own = self.state_dict(prefix=prefix)
        if not all(torch.equal(state_dict[key].to(own[key]), own[key]) for key in own.keys() & state_dict.keys()):
            raise ArgumentError(_KEEPS_ITS_WEIGHTS)
        super()._load_from_state_dict(state_dict, prefix, *further)

    def forward(self, x: Tensor) -> Tensor | Any:
        """Compute logits (B, num_classes) of images (B, in_chans, H, W); a feature extractor returns a list of maps."""
        if torch.jit.is_tracing():
            raise ArgumentError("torch.jit.trace sees nothing of an optimized model: give it the original")
        check_input(x, self.in_chans, self.patch_size)
        own = next(self.folded.parameters())
        if x.device != own.device or not x.is_floating_point():
            raise ArgumentError(
                f"images of {x.dtype} on {x.device}: this model takes floating point images on {own.device}"
            )
        inputs, kind = x.to(own.dtype), own.device.type
        # A graph that was compiled or captured under autocast would keep its type.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            outputs = self.runtime(inputs) if len(x) else as_list(self.folded(inputs))
        outputs = [output.to(x.dtype) for output in outputs]
        return outputs if self._returns_list else outputs[0]

    def train(self, mode: bool = True) -> OptimizedConvMixer:
        """Raise an error unless `mode` is False: evaluation mode is the only one."""
        if mode:
            raise ArgumentError("an optimized model cannot be trained: train the original, then optimize it again")
        return super().train(False)

    def extra_repr(self) -> str:
        return str(self.choice)
