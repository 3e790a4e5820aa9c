"""SIGTERM and Ctrl-C while training: obeyed after the current step, or at once while `torch.compile` is at work.

A compilation takes minutes, most of it in other processes: C++ compilers, and on GPUs a helper that compiles Triton
kernels. A terminal's Ctrl-C reaches them, too; some versions of PyTorch then wait for the helper for ever, and all of
them wait for the other processes when the interpreter exits. So this module ends these processes. Python runs a
handler in the main thread, between two of its own instructions. If that thread is inside PyTorch, as it is while a
backward pass compiles on a GPU, another thread, which learns of signals through a pipe, does the work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch._dynamo

from convmixer.errors import ConvMixerError

PATIENCE = 2.0  # seconds until the processes of a compilation that ignores a signal are ended
LIMIT = 7.0  # seconds until this process is ended


class StoppedWhileCompilingError(BaseException):
    """A signal came during a compilation. Not an Exception, as compilers handle those.

    Attributes:
        number: The number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and SIGINT within the block, instead of obeying them: the function given returns which came, or 0.

    A second SIGINT interrupts as usual. Only the main thread may set handlers; in another, nothing changes.

    Raises:
        StoppedWhileCompilingError: From the block, if a signal comes while `torch.compile` is at work. The processes
            that it started have ended by then. If it cannot be interrupted, the whole process ends after some
            seconds, with status 128 + signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    stop = _Stop()
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    callbacks = torch._dynamo.callback_handler
    callbacks.register_start_callback(stop.begin)
    callbacks.register_end_callback(stop.end)
    try:
        with stop.watched():
            yield lambda: stop.number
        if stop.compiled:
            stop.end_compilers()
    except BaseException as error:
        if not stop.compiled:
            raise
        stop.leaving = True
        stop.end_compilers()
        if isinstance(error, (StoppedWhileCompilingError, KeyboardInterrupt, ConvMixerError)):
            raise
        raise StoppedWhileCompilingError(stop.number) from error  # compilers fail without their processes
    finally:
        for callback, registered in ((stop.begin, callbacks.start_callbacks), (stop.end, callbacks.end_callbacks)):
            if callback in registered:  # torch._dynamo.reset() empties the lists
                registered.remove(callback)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Which signal came, and whether a compilation is running."""

    def __init__(self) -> None:
        self.number = 0
        self.running = 0  # compilations, which nest
        self.compiled = False  # when the signal came, or later
        self.leaving = False
        self.halting = False
        self.again = False  # whether the next signal is our own
        self.older: set[int] = set()  # processes from before the compilation
        self.halted: dict[int, Any] = {}  # its processes when the signal came

    def note(self, number: int, _frame: Any = None) -> None:
        """Handle a signal, in the main thread."""
        if self.leaving or self.halting:  # processes that are found, and not recorded, would be left behind
            return
        if self.number and number == signal.SIGINT and not self.again:
            raise KeyboardInterrupt
        self.number, self.again = self.number or number, False
        self._obey()

    def begin(self, *_: Any) -> None:
        if not self.running:
            self.older = set(_descendants())
        self.running += 1
        if self.number:
            self._obey()

    def end(self, *_: Any) -> None:
        self.running -= 1

    def _obey(self) -> None:
        if self.running and not self.leaving:
            self.compiled = True
            # The exception makes `subprocess.run` kill the compiler, and the processes of that lose their parent.
            self.halting = True
            try:
                while fresh := _halt(self.halted, self.older):  # one may start another before it is suspended
                    self.halted |= fresh
            finally:
                self.halting = False
            raise StoppedWhileCompilingError(self.number)

    def end_compilers(self) -> None:
        end_compilers(self.older, self.halted)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let another thread end a compilation that does not notice a signal."""
        read, write = os.pipe()
        if hasattr(os, "set_blocking"):  # on Windows from Python 3.12 on
            os.set_blocking(write, False)
        former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        left = threading.Event()
        thread = threading.Thread(target=self._watch, args=(read, former, left), daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            signal.set_wakeup_fd(former)
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes the thread, too
                os.write(write, b"\0")  # closing would not, as children by fork hold this end open
            thread.join()
            os.close(read)
            os.close(write)

    def _watch(self, read: int, former: int, left: threading.Event) -> None:
        while (numbers := os.read(read, 64)) and not left.is_set():
            if former != -1:
                with contextlib.suppress(OSError):
                    os.write(former, numbers)
            number = next((n for n in numbers if n in (signal.SIGTERM, signal.SIGINT)), 0)
            if number and not self.again:
                self._insist(number, left)

    def _insist(self, number: int, left: threading.Event) -> None:
        begun = time.monotonic()
        helpers = True
        while not left.wait(0.2) and self.running and not self.leaving:
            waited = time.monotonic() - begun
            if waited > PATIENCE and helpers:
                helpers, self.compiled = False, True
                self.number = self.number or number
                self.end_compilers()
                if hasattr(signal, "pthread_kill"):  # an exception that nothing can catch is lost: raise another
                    self.again = True
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
            elif waited > LIMIT:
                message = "stopped while compiling, which could not be interrupted; what was saved before is intact"
                with contextlib.suppress(OSError):
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
                os._exit(128 + number)


def _descendants() -> dict[int, Any]:
    """Return the processes started by this one, and by those, by number."""
    import psutil  # accelerate needs it

    return {process.pid: process for process in psutil.Process().children(recursive=True)}


def end_compilers(older: Container[int], halted: Mapping[int, Any] | None = None) -> None:
    """End the processes and threads of `torch.compile`, within some seconds.

    Args:
        older: Numbers of processes from before the compilation; only helpers of `torch.compile` among them are ended.
        halted: Processes that are known and suspended.
    """
    import psutil
    from torch._inductor import async_compile

    threads = None
    if async_compile.AsyncCompile.pool.cache_info().currsize:
        threads = async_compile.AsyncCompile.pool()
        threads.shutdown(wait=False, cancel_futures=True)  # each job that is left would start a compiler
        async_compile.AsyncCompile.pool.cache_clear()
    # It tells the helper to end, and waits for that.
    shutdown = threading.Thread(target=async_compile.shutdown_compile_workers, daemon=True)
    shutdown.start()
    begun = time.monotonic()
    found = dict(halted or {})  # also those whose parents have gone
    while time.monotonic() < begun + 4:
        if fresh := _halt(found, older):
            found |= fresh
            continue
        for number, process in list(found.items()):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    del found[number]
                elif time.monotonic() < begun + 0.5:
                    process.terminate()  # a compiler removes what it had half written
                    process.resume()
                else:
                    process.kill()
            except psutil.Error:
                del found[number]
        working = shutdown.is_alive() or any(thread.is_alive() for thread in getattr(threads, "_threads", ()))
        if not found and not working:
            return
        time.sleep(0.05)


def _halt(found: Container[int], older: Container[int]) -> dict[int, Any]:
    """Suspend and return processes that are not among those found: one that ends may have started another."""
    import psutil

    fresh = {}
    for number, process in _descendants().items():
        with contextlib.suppress(psutil.Error):
            if number not in found and (number not in older or "compile_worker" in " ".join(process.cmdline())):
                process.suspend()
                if process.status() != psutil.STATUS_ZOMBIE:
                    fresh[number] = process
    return fresh
