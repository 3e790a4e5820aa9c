"""The backend "onnxruntime": a model in ONNX Runtime on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import optional
from convmixer.runtime.chunks import ChunkRule, chunk_sizes, join_chunks
from convmixer.runtime.convert import to_onnx
from convmixer.runtime.folding import FoldedConvMixer
from convmixer.runtime.graph_cache import GraphCache
from convmixer.runtime.protocol import CPU, Built, CpuBackend, Prepared, Request, missing_modules

_UNRELEASABLE: list[Any] = []  # in a forked child: the parent's sessions


class OnnxRuntime:
    """An ONNX file in ONNX Runtime on the CPU, in float32: one thread per chunk, or all for few images.

    Args:
        data: The file.
        threads: Number of threads.
        chunk_rule: Images in a chunk; None: whole batches, computed by all threads.
    """

    def __init__(self, data: bytes, threads: int, chunk_rule: ChunkRule | None) -> None:
        self._library = optional("onnxruntime", "onnxruntime", "export")
        self._data, self.threads, self.chunk_rule = data, threads, chunk_rule
        self._start()

    def _start(self) -> None:
        self._sessions = GraphCache(self._load)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="convmixer")

    def after_fork(self) -> None:
        """Start threads again; sessions whose threads are gone cannot even be released."""
        _UNRELEASABLE.append((self._sessions, self._pool))
        self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self.threads, self.chunk_rule)

    def _load(self, threads: int) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return self._library.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = x.detach().float().contiguous()
        share_chunks = self.chunk_rule is None or self.threads == 1 or len(x) < self.threads
        chunk = len(x) if self.chunk_rule is None else self.chunk_rule(*x.shape[2:])
        session = self._sessions(self.threads if share_chunks else 1)
        name = session.get_inputs()[0].name

        def compute(part: Tensor) -> list[Tensor]:
            return [torch.from_numpy(array) for array in session.run(None, {name: part.numpy()})]

        if share_chunks:
            return join_chunks([compute(part) for part in x.split(chunk)])
        return join_chunks(list(self._pool.map(compute, x.split(chunk_sizes(len(x), chunk, self.threads)))))


class OnnxRuntimeBackend(CpuBackend):
    """ONNX Runtime, in float32."""

    name = "onnxruntime"

    def missing(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str | None:
        return missing_modules("onnxruntime", ("onnxruntime", "onnxscript"), "export")

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        if dtype != torch.float32:
            return f"dtype={dtype}: onnxruntime computes convolutions on a CPU only in float32; use openvino or compile"
        return None

    def convert(self, request: Request, folded: FoldedConvMixer) -> bytes:
        return to_onnx(folded)

    def build(self, request: Request, prepared: Prepared, chunk: int | None) -> Built:
        runtime = OnnxRuntime(prepared.program, request.threads, request.chunk_rule(chunk))
        return Built(runtime, "own", request.threads, request.describe_chunks(chunk))
