"""A step of training as one CUDA graph: recorded once, then replayed on new values in the same memory.

Where images are small, launching a kernel takes the host longer than running it takes a GPU. A graph launches a whole
step at once. In return shapes are fixed, and what differs from step to step must be a tensor that stays where it is.

`Replay` decides when a call is recorded and which recording is replayed; a `Recorder` records. `CudaGraphs` is the only
one, and where there is none, calls are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

FIRST = 3  # calls of a kind that run as they are: they compile, choose kernels, and allocate what the optimizer keeps
KEPT = 3  # recordings, each of which holds the memory of a whole step


class Recorder(Protocol):
    """A way of recording work on a device."""

    def run(self, function: Callable[[], None]) -> None:
        """Call a function where it will be recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call a function without running its work.

        Returns:
            What runs that work, on the same memory.

        Raises:
            RuntimeError: It cannot be recorded; nothing of it has run.
        """


class CudaGraphs:
    """Records on a stream of its own, as CUDA demands."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], None]) -> None:
        # Handles and memory of libraries belong to a stream: those made here are there when recording.
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            function()
        caller.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Workers that hand over images may call CUDA from threads of their own meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError:
            self._leave()
            raise
        return graph.replay

    def _leave(self) -> None:
        """After a failed recording, up to PyTorch 2.11, the generator would wait for its end for ever: renew it."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)


class _Recording:
    """A call with its inputs in memory of its own."""

    def __init__(self, recorder: Recorder, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.replay = recorder.record(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> None:
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        self.replay()


class Replay:
    """A function that is called over and over, recorded where there is a recorder.

    Args:
        function: Called with tensors by position and constants by name. It returns nothing, and keeps its results in
            tensors that stay where they are.
        recorder: None calls the function each time.
        failed: Told why a call could not be recorded, before the function is called as it is, from then on.
    """

    def __init__(
        self, function: Callable[..., None], recorder: Recorder | None, failed: Callable[[RuntimeError], None]
    ) -> None:
        self.function, self.recorder, self.failed = function, recorder, failed
        self.calls: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *inputs: Tensor, **constants: Any) -> None:
        call = partial(self.function, **constants)
        if self.recorder is None:
            call(*inputs)
            return
        kind = (*((x.shape, x.dtype) for x in inputs), *sorted(constants.items()))
        if kind not in self.recordings:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= FIRST:
                self.recorder.run(partial(call, *inputs))
                return
            try:
                recording = _Recording(self.recorder, call, inputs)
            except RuntimeError as error:
                self.recorder = None
                self.failed(error)
                call(*inputs)
                return
            self._keep(kind, recording)
        self.recordings[kind](*inputs)

    def _keep(self, kind: Hashable, recording: _Recording) -> None:
        """Keep a recording, and of the others the latest."""
        while len(self.recordings) >= KEPT:
            oldest = next(iter(self.recordings))
            del self.recordings[oldest], self.calls[oldest]
        self.recordings[kind] = recording
