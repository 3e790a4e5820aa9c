"""Who may compute while PyTorch traces, and who may change what the whole process shares.

While they work, `torch.export`, the ONNX exporter and TorchInductor replace `nn.Module.__call__`, raise flags and
switch oneDNN off, for all threads: a model that is called meanwhile rounds differently, or fails. So tracing waits
until no call of this package computes, and calls wait until no trace is under way. Filters of warnings and standard
output also belong to the process: whoever changes them takes turns.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator

_SETTINGS = threading.RLock()


class _Gate:
    """Many compute, or one traces. A thread that computes may trace in between: it gives its place up meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._computing: dict[int, int] = {}  # calls under way, by thread
        self._tracer: int | None = None
        self._waiting = 0

    def enter(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if me != self._tracer and me not in self._computing:
                self._changed.wait_for(lambda: self._tracer is None and not self._waiting)
            self._computing[me] = self._computing.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._computing[me] -= 1
            if not self._computing[me]:
                del self._computing[me]
                self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            calls = self._computing.pop(me, 0)
            self._changed.notify_all()
        try:
            with _SETTINGS, self._tracing(me):
                yield
        finally:
            if calls:
                with self._changed:
                    self._changed.wait_for(lambda: self._tracer in (None, me))
                    self._computing[me] = calls

    @contextlib.contextmanager
    def _tracing(self, me: int) -> Iterator[None]:
        outer = self._tracer == me
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._computing)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._tracer = me
        try:
            yield
        finally:
            if not outer:
                with self._changed:
                    self._tracer = None
                    self._changed.notify_all()


_GATE = _Gate()


def _start_anew() -> None:
    """Renew the locks in a forked child, whose one thread cannot wait for those that were left behind."""
    global _GATE, _SETTINGS
    _GATE, _SETTINGS = _Gate(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Run a model: no other thread of this package traces within the block."""
    gate = _GATE
    gate.enter()
    try:
        yield
    finally:
        gate.leave()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Export or compile a model: no other thread of this package computes or traces within the block."""
    with _GATE.exclusive():
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Ignore warnings within the block; one thread at a time, as their filters are the whole process's."""
    with _SETTINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
