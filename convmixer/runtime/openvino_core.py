"""OpenVINO's Core: one per process, loaded in a thread of its own.

Where there is AMX, OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack. When it is unloaded,
it unmaps that stack and restores the previous one, if it still finds its own. Of two plugins that are unloaded in the
order in which they were loaded, the second restores the stack of the first, which is no longer mapped, and the next
signal that has a handler in Python ends the process without a message. So the plugin is loaded once, and whatever loads
it (NNCF does, too) runs in a thread that takes no signals and ends with its work.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from convmixer.errors import DependencyError, optional

if TYPE_CHECKING:
    import openvino

T = TypeVar("T")
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP")
_LOCK = threading.Lock()
_CORES: list[tuple[int, openvino.Core]] = []  # at most one, with the process that made it


def refuse_forked() -> None:
    """Raise a DependencyError in a forked child of a process that has used OpenVINO: it could wait forever."""
    if _CORES and _CORES[-1][0] != os.getpid():
        raise DependencyError(
            "OpenVINO cannot be used in a process that was forked from one that has used it: start it by spawn, as in "
            "DataLoader(multiprocessing_context='spawn')"
        )


def aside(work: Callable[[], T]) -> T:
    """Call `work` in a thread of its own, and return or raise what it does."""
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


def core() -> openvino.Core:
    """Return the one of this process, with the CPU plugin loaded; raise a DependencyError without OpenVINO."""
    runtime = optional("openvino", "openvino", "export")

    def load() -> openvino.Core:
        made = runtime.Core()
        made.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
        return made

    refuse_forked()
    with _LOCK:
        if not _CORES:
            _CORES.append((os.getpid(), aside(load)))
        return _CORES[-1][1]


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
