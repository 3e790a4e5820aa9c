"""A training step as one CUDA graph: captured once, then replayed on new values in the same memory.

Where images are small, launching a kernel takes the host longer than running it takes the GPU. A graph launches a whole
step at once. In return shapes are fixed, and what differs from step to step must be a tensor that stays where it is.

`Graphed` decides which calls are captured and replayed; `CudaGraphs` does it. Without it, calls are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # eager calls before a capture: they compile, choose kernels, and allocate the optimizer's state
KEPT = 3  # graphs, each of which holds the memory of a whole step


class Graphs(Protocol):
    """A way to capture work on a device."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Call a function where it will be captured."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call a function without running its work.

        Returns:
            What runs that work, on the same memory.

        Raises:
            RuntimeError: It cannot be captured. None of its work has run.
        """


class CudaGraphs:
    """Captures on a stream of its own, since CUDA cannot on the default stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        # Workspaces and cached memory belong to a stream: those allocated here are there for the capture.
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            function()
        caller.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local, since the thread that pins a stream's images calls CUDA meanwhile. The outer `with` restores
            # the caller's stream after a failed capture; the inner one does not.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            self._renew_generator()
            raise RuntimeError(str(error.__context__ or error)) from error  # the cause, not what it led to
        return graph.replay

    def _renew_generator(self) -> None:
        """Up to PyTorch 2.11 a failed capture leaves the generator in capture mode: give it a new state."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)


class Captured:
    """A captured call, with memory of its own for the inputs.

    Args:
        graphs: Captures it.
        function: Takes tensors like `inputs`. It returns nothing, and keeps its results in tensors that stay where
            they are.
        inputs: Examples. Their shapes, types and layouts are those of all calls.
    """

    def __init__(self, graphs: Graphs, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.replay = graphs.capture(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> None:
        for static, new in zip(self.inputs, inputs, strict=True):
            static.copy_(new)
        self.replay()


class Graphed:
    """A function that is captured after a few calls, once for each combination of shapes and constants.

    Args:
        function: As `Captured` takes it; constants go by name.
        graphs: Captures it; None leaves all calls as they are.
        failed: Called with the error when a capture fails. The calls after that are plain calls.
    """

    def __init__(
        self, function: Callable[..., None], graphs: Graphs | None, failed: Callable[[RuntimeError], None]
    ) -> None:
        self.function, self.graphs, self.failed = function, graphs, failed
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, Captured] = {}

    def __call__(self, *inputs: Tensor, **constants: Any) -> None:
        call = partial(self.function, **constants)
        if self.graphs is None:
            call(*inputs)
            return
        kind = (*((x.shape, x.dtype) for x in inputs), *sorted(constants.items()))
        if kind not in self.captured:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= WARM_UP:
                self.graphs.warm_up(partial(call, *inputs))
                return
            self._make_room()
            try:
                self.captured[kind] = Captured(self.graphs, call, inputs)
            except RuntimeError as error:
                self.graphs = None
                self.failed(error)
                call(*inputs)
                return
        self.captured[kind](*inputs)

    def _make_room(self) -> None:
        """Drop the oldest graph when there are `KEPT`."""
        if len(self.captured) >= KEPT:
            oldest = next(iter(self.captured))
            del self.captured[oldest], self.calls[oldest]
