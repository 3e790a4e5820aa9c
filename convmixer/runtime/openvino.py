"""A model in OpenVINO on the CPU."""

from __future__ import annotations

import queue
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import optional
from convmixer.runtime import openvino_core
from convmixer.runtime.chunks import Rule, _Graphs, _join, pieces

_LEFT_BEHIND: list[Any] = []  # of the parent's, in a child by fork


class OpenVINO:
    """An OpenVINO model on the CPU, one stream for each thread; a batch below that many images uses one stream of all.

    Args:
        model: From `to_openvino`, or quantised.
        precision: What it computes in, beside what is quantised.
        threads: Number of them.
        rule: Images in a piece; None: whole batches in one stream of all threads.
    """

    def __init__(self, model: Any, precision: torch.dtype, threads: int, rule: Rule | None) -> None:
        self._ov, self.model = optional("openvino", "openvino", "export"), model
        self.precision, self.threads, self.rule = precision, threads, rule
        hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        self._options = {"INFERENCE_PRECISION_HINT": hints[precision], "INFERENCE_NUM_THREADS": threads}
        self._graph = _Graphs(self._compile)

    def after_fork(self) -> None:
        """OpenVINO's threads are gone: without them nothing can be compiled, nor what was compiled be released."""
        if self._graph not in _LEFT_BEHIND:
            _LEFT_BEHIND.append(self._graph)
        openvino_core.refuse_forked()

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.xml"
            self._ov.save_model(self.model, file, compress_to_fp16=False)
            graph, weights = file.read_bytes(), file.with_suffix(".bin").read_bytes()
        return _read_openvino, (graph, weights, self.precision, self.threads, self.rule)

    def _compile(self, streams: int, *shape: int) -> tuple[Any, queue.SimpleQueue[Any]]:
        fixed = self.model.clone()
        fixed.reshape(list(shape))
        compiled = openvino_core.core().compile_model(fixed, "CPU", {**self._options, "NUM_STREAMS": streams})
        return compiled, queue.SimpleQueue()

    def __call__(self, x: Tensor) -> list[Tensor]:
        batch, *rest = x.shape
        alone = self.rule is None or batch < self.threads
        sizes = [batch] if self.rule is None or alone else pieces(batch, self.rule(*rest[1:]), self.threads)
        running: list[tuple[Any, Any, Any]] = []
        try:
            for part in x.detach().float().contiguous().split(sizes):
                graph, idle = self._graph(1 if alone else self.threads, len(part), *rest)
                try:
                    request = idle.get_nowait()
                except queue.Empty:
                    request = graph.create_infer_request()
                array = part.numpy()  # kept until the request is done, which reads it in place
                request.set_input_tensor(self._ov.Tensor(array, shared_memory=True))
                request.start_async()
                running.append((request, idle, array))
        finally:
            for request, _, _ in running:
                request.wait()
        parts = []
        for request, idle, _ in running:
            parts.append([torch.from_numpy(output.data.copy()) for output in request.output_tensors])
            idle.put(request)
        return _join(parts)


def _read_openvino(graph: bytes, weights: bytes, *settings: Any) -> OpenVINO:
    return OpenVINO(openvino_core.core().read_model(graph, weights), *settings)
