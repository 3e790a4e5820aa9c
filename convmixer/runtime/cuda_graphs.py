"""Work on a GPU as CUDA graphs: captured once, then replayed on new values in the same memory.

Where images are small or few, launching a kernel takes the host longer than running it takes the GPU. A graph launches
all kernels of a call at once. In return, shapes are fixed, and whatever differs from call to call must be a tensor at a
fixed address.

`Graphed` decides which calls of a function, such as a training step, are captured and replayed; `Replayed` does so for
models in inference. `CudaGraphs` captures.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)
WARM_UP = 3  # eager calls before a capture: they compile, choose kernels, and allocate the optimizer's state
GRAPH_BYTES = 2**25  # of a feature map, above which launches on a GPU cost little and memory much


class Graphs(Protocol):
    """A way to capture work on a device."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Call a function on the stream on which it will be captured."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call a function without running its work.

        Returns:
            A function that runs that work, on the same memory.

        Raises:
            RuntimeError: It cannot be captured. None of its work has run.
        """


class CudaGraphs:
    """Captures on a stream of its own, since CUDA cannot on the default stream.

    Args:
        device: A CUDA device.
        shared: Graphs use the same memory, so that replaying one overwrites what another left there.
    """

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle() if shared else None

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
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            self._renew_generator()
            raise RuntimeError(str(error.__context__ or error)) from error  # the cause, not what it led to
        return graph.replay

    def _renew_generator(self) -> None:
        """Give the generator a new state: up to PyTorch 2.11 a failed capture leaves it in capture mode."""
        generator = torch.cuda.default_generators[self.stream.device.index]
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)


class Captured:
    """A captured call, with memory of its own for the inputs.

    Args:
        graphs: Captures it.
        function: Takes tensors like `inputs`. It returns nothing, and writes its results to tensors at
            fixed addresses.
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
    """A function that is captured after a few calls, once for each combination of constants.

    Inputs of other shapes or types make new graphs. The old ones go first, since each holds the memory of a whole call,
    and calls of a run that have changed seldom change back.

    Args:
        function: As `Captured` takes it; constants are keyword arguments.
        graphs: Captures it; None: calls are never captured.
        failed: Called with the error when a capture fails. Later calls are not captured.
    """

    def __init__(
        self, function: Callable[..., None], graphs: Graphs | None, failed: Callable[[RuntimeError], None]
    ) -> None:
        self.function, self.graphs, self.failed = function, graphs, failed
        self.inputs: Hashable = None
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, Captured] = {}

    def __call__(self, *inputs: Tensor, **constants: Any) -> None:
        call = partial(self.function, **constants)
        if self.graphs is None:
            call(*inputs)
            return
        given = tuple((x.shape, x.dtype) for x in inputs)
        if given != self.inputs:
            self._forget()
            self.inputs = given
        kind = tuple(sorted(constants.items()))
        if kind not in self.captured:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= WARM_UP:
                self.graphs.warm_up(partial(call, *inputs))
                return
            try:
                self.captured[kind] = Captured(self.graphs, call, inputs)
            except RuntimeError as error:
                self.graphs = None
                self._forget()
                self.failed(error)
            if self.graphs is None:  # not in the handler, whose error keeps the memory of the failed capture
                call(*inputs)
                return
        self.captured[kind](*inputs)

    def _forget(self) -> None:
        """Drop all graphs; the last replay of one may still be at work."""
        for device in {x.device for graph in self.captured.values() for x in graph.inputs if x.is_cuda}:
            torch.cuda.synchronize(device)
        self.calls.clear()
        self.captured.clear()


@dataclass(frozen=True)
class SmallFeatureMaps:
    """The test whether a ConvMixer's feature map of images has at most `most` bytes."""

    dim: int
    patch_size: int
    most: int

    def __call__(self, x: Tensor) -> bool:
        batch, _, height, width = x.shape
        positions = (height // self.patch_size) * (width // self.patch_size)
        return batch * self.dim * positions * x.element_size() <= self.most


Compute = Callable[[Tensor], list[Tensor]]  # images (B, C, H, W) -> outputs


@dataclass
class _Call:
    """What computes the images of one shape, layout, type and device.

    Attributes:
        run: Computes them and, as long as it exists, keeps the weights that a graph of it reads.
        captured: The graph, once there is one.
        outputs: What the graph writes.
    """

    run: Compute
    captured: Captured | None = None
    outputs: list[Tensor] = field(default_factory=list)


class Replayed:
    """A model in inference whose calls are replayed, with a graph for each shape that comes a second time.

    Threads may share it: they take turns, on the device as well. Each call returns new tensors.

    Args:
        run: Computes outputs without gradients.
        worth: Says whether a call with such images is worth a graph, which keeps the memory of the entire call.
        make: Makes the `Graphs` for a device; None: `CudaGraphs`.
        bind: From images to what computes images of the same shape, type and layout. It owns the weights that it
            reads, so that they live as long as a graph that reads them, and it compiles nothing any more. None: `run`
            does.
    """

    most_graphs = 8  # the one unused for longest is dropped first

    def __init__(
        self,
        run: Compute,
        worth: Callable[[Tensor], bool],
        make: Callable[[torch.device], Graphs] | None = None,
        bind: Callable[[Tensor], Compute] | None = None,
    ) -> None:
        self.run, self.worth, self.make, self.bind = run, worth, make, bind
        self._lock, self._graphs = threading.Lock(), dict[torch.device, Graphs]()
        self._calls: OrderedDict[Hashable, _Call] = OrderedDict()
        self._used: dict[torch.device, Any] = {}  # an event after the last use of the graphs of a device
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run, self.worth, self.make, self.bind)

    def after_fork(self) -> None:
        """Do nothing: CUDA does not work in a forked child process, which `OptimizedConvMixer` refuses before."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()  # a graph of the caller's
        if self._failed or capturing or not self.worth(x):
            return self.run(x)
        kind = (x.shape, x.stride(), x.dtype, x.device)
        with torch.inference_mode(False), torch.no_grad():
            with self._lock:
                call = self._calls.get(kind)
                if call is not None:
                    self._calls.move_to_end(kind)
                    if call.captured is None:
                        self._capture(call, x)
                    if call.captured is not None:
                        return self._replay(call.captured, call.outputs, x)
            if call is not None:
                return call.run(x.clone())  # laid out as those that it was bound for
            return self._first_call(kind, x)

    def _first_call(self, kind: Hashable, x: Tensor) -> list[Tensor]:
        """Compute without a graph. It may compile, which waits for calls of other threads: not in the lock."""
        images = x.clone()  # laid out as those of a graph
        call = _Call(self.bind(images) if self.bind else self.run)
        outputs = call.run(images)
        with self._lock:
            self._calls.setdefault(kind, call)
            if len(self._calls) > self.most_graphs:
                if x.device in self._used:  # a replay of the oldest may still be at work
                    self._used[x.device].synchronize()
                self._calls.popitem(last=False)
        return outputs

    def _capture(self, call: _Call, x: Tensor) -> None:
        """Make the graph of a call, unless it cannot be captured."""
        outputs: list[Tensor] = []

        def compute(images: Tensor) -> None:
            outputs[:] = call.run(images)

        images = x.clone()
        try:
            if x.device not in self._graphs:
                self._graphs[x.device] = self.make(x.device) if self.make else CudaGraphs(x.device, shared=True)
            self._graphs[x.device].warm_up(lambda: compute(images))
            call.captured, call.outputs = Captured(self._graphs[x.device], compute, (images,)), outputs
        except RuntimeError as error:
            self._failed = True
            self._calls.clear()  # frees their memory
            self._graphs.clear()
            _LOGGER.warning("calls are not replayed as CUDA graphs: %s", error)

    def _replay(self, graph: Captured, outputs: list[Tensor], x: Tensor) -> list[Tensor]:
        if not x.is_cuda:
            graph(x)
            return [output.clone() for output in outputs]
        # Another stream may still read what the last call wrote.
        stream = torch.cuda.current_stream(x.device)
        if x.device in self._used:
            stream.wait_event(self._used[x.device])
        graph(x)
        results = [output.clone() for output in outputs]
        self._used[x.device] = stream.record_event()
        return results
