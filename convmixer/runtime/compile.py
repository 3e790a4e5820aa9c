"""The backend "compile": a module compiled by TorchInductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convmixer.errors import DependencyError, first_line
from convmixer.model import DepthwiseConv2d, mirror
from convmixer.native.compiled_code import settle
from convmixer.native.library import inductor_lacks
from convmixer.ops import prefers_channels_last
from convmixer.runtime.chunks import ChunkRule, as_list, join_chunks
from convmixer.runtime.cuda_graphs import Compute
from convmixer.runtime.eager import Eager, EagerBackend
from convmixer.runtime.graph_cache import GraphCache
from convmixer.runtime.protocol import CPU
from convmixer.tracing import quietly, tracing


class Compiled(Eager):
    """A module compiled by TorchInductor, with its weights frozen into the graph, for each shape of a chunk.

    It is compiled from an exported graph: no guards are checked at each call, and no limit of recompilations is shared
    with other models.
    """

    def __init__(self, module: nn.Module, chunk_rule: ChunkRule | None = None) -> None:
        super().__init__(mirror(module), chunk_rule)  # others may export the module itself
        for layer in self.module.modules():
            if isinstance(layer, DepthwiseConv2d):
                layer.exports_kernels = True  # TorchInductor takes the kernels whole
        settle("TORCHINDUCTOR_CACHE_DIR", _default_cache, "graphs of TorchInductor")
        self._graphs = GraphCache(self._compile, tracing)

    def after_fork(self) -> None:
        """Compile again, for the number of threads that the child has; OpenMP's own are gone."""
        self._graphs = GraphCache(self._compile, tracing)

    def compute(self, x: Tensor) -> list[Tensor]:
        if x.is_inference():
            with torch.inference_mode(False):
                x = x.clone()  # graphs are for ordinary tensors
        return as_list(self._graphs(*_key(x))(x))

    def bind(self, x: Tensor) -> Compute:
        """Hold on to the graphs of these images, which the cache may drop: their weights are inside them."""
        graphs = {key: self._graphs(*key) for key in map(_key, self.split(x))}

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return join_chunks([as_list(graphs[_key(chunk)](chunk)) for chunk in self.split(images)])

        return run

    def _compile(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor], Any]:
        from torch import _inductor
        from torch._inductor import config

        example = torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        kernel_size = max(
            m.kernel_size[0] for m in self.module.modules() if isinstance(m, nn.Conv2d) and m.stride[0] == 1
        )
        # TorchInductor moves depthwise convolutions to channels_last, which is slow with 9x9 kernels on GPUs.
        moves = device.type != "cuda" or prefers_channels_last(device, dtype, kernel_size)
        with quietly(), torch.no_grad(), config.patch(freezing=True, layout_optimization=moves):
            program = torch.export.export(self.module, (example,)).module()
            try:
                compiled: Any = _inductor.compile(program, [example])
            except Exception as error:  # of the compiler at hand
                reason = first_line(error)
                raise DependencyError(
                    f"TorchInductor cannot compile here ({type(error).__name__}: {reason}): choose another backend"
                ) from error
        return compiled  # type: ignore[no-any-return]


def _key(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    """Return what a graph is compiled for."""
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _default_cache() -> str:
    from torch._inductor.runtime.runtime_utils import default_cache_dir

    return default_cache_dir()


class CompileBackend(EagerBackend):
    """A folded module compiled by TorchInductor, on CPUs and CUDA devices."""

    name = "compile"
    runtime = Compiled

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        lacking = inductor_lacks(device)
        return lacking and f"compile {lacking}"

    def trial(self, device: torch.device) -> None:
        """Compile one small layer."""
        layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GELU()).to(device).eval()
        Compiled(layers)(torch.zeros(1, 1, 8, 8, device=device))
