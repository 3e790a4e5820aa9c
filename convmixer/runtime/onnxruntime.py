"""A model in ONNX Runtime on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import optional
from convmixer.runtime.chunks import Rule, _Graphs, _join, pieces

_LEFT_BEHIND: list[Any] = []  # of the parent's, in a child by fork


class OnnxRuntime:
    """An ONNX file in ONNX Runtime on the CPU, in float32: one thread to a piece, or all where images are few."""

    def __init__(self, data: bytes, threads: int, rule: Rule | None) -> None:
        self._library = optional("onnxruntime", "onnxruntime", "export")
        self._data, self.threads, self.rule = data, threads, rule
        self._start()

    def _start(self) -> None:
        self._session = _Graphs(self._load)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="convmixer")

    def after_fork(self) -> None:
        """Start threads anew; sessions whose threads are gone cannot even be released."""
        _LEFT_BEHIND.append((self._session, self._pool))
        self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self.threads, self.rule)

    def _load(self, threads: int) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return self._library.InferenceSession(self._data, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> list[Tensor]:
        x = x.detach().float().contiguous()
        alone = self.rule is None or self.threads == 1 or len(x) < self.threads
        chunk = len(x) if self.rule is None else self.rule(*x.shape[2:])
        session = self._session(self.threads if alone else 1)
        name = session.get_inputs()[0].name

        def run(part: Tensor) -> list[Tensor]:
            return [torch.from_numpy(array) for array in session.run(None, {name: part.numpy()})]

        if alone:
            return _join([run(part) for part in x.split(chunk)])
        return _join(list(self._pool.map(run, x.split(pieces(len(x), chunk, self.threads)))))
