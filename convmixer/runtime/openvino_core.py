"""OpenVINO's Core: one for the process, loaded in no thread of the user.

Where there is AMX, OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack. When it goes, it
unmaps that stack and puts the one before back, if it still finds its own. Of two that go in the order in which they
came, the second puts back the stack of the first, which is no longer mapped, and the next signal that has a handler
in Python ends the process without a word. So the plugin is loaded once, and whatever loads it (NNCF does, too) runs in
a thread that takes no signals and ends with its work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from convmixer.errors import DependencyError, optional

T = TypeVar("T")
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP")
_LOCK = threading.Lock()
_KEPT: list[tuple[int, Any]] = []  # with the process that made it


def refuse_forked() -> None:
    """Raise DependencyError in a child by fork of a process that has used OpenVINO: it could wait for ever."""
    if _KEPT and _KEPT[-1][0] != os.getpid():
        raise DependencyError(
            "OpenVINO cannot be used in a process that was forked from one that has used it: start it by spawn, as in "
            "DataLoader(multiprocessing_context='spawn')"
        )


def aside(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done in a thread of its own."""
    refuse_forked()
    result: Future[T] = Future()

    def run() -> None:
        if hasattr(signal, "pthread_sigmask"):  # threads that OpenVINO starts inherit it: signals are the main thread's
            faults = {getattr(signal, name) for name in _FAULTS}
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="convmixer-openvino", daemon=True).start()
    return result.result()


def core() -> Any:
    """The process's `openvino.Core`, with the CPU plugin loaded; a DependencyError without OpenVINO."""
    openvino = optional("openvino", "openvino", "export")

    def load() -> Any:
        made = openvino.Core()
        made.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
        return made

    refuse_forked()
    with _LOCK:
        if not _KEPT:
            _KEPT.append((os.getpid(), aside(load)))
        return _KEPT[-1][1]


def _start_anew() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
