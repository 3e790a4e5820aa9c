"""Processes that decode images ahead of the model."""

from __future__ import annotations

import atexit
import functools
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from convmixer.errors import DataError
from convmixer.hardware import usable_cores

_deaths: list[str] = []  # what torch says of workers that died, until a loader finds out


def default_workers() -> int:
    """Return the processor cores for each of the processes that train on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def load(dataset: Any, name: str, **options: Any) -> Generator[Any]:
    """Yield what a DataLoader yields, and draw nothing from the caller's random numbers.

    Args:
        dataset: The data set.
        name: Its name, for errors.
        options: Further arguments of DataLoader.

    Raises:
        DataError: A worker died. It is raised where a batch is asked for, never in the middle of other work.
    """
    loader = DataLoader(dataset, worker_init_fn=_begin, generator=torch.Generator(), **options)
    batches = iter(loader)
    workers = list(getattr(batches, "_workers", ()))  # not all new children: another thread may start its own
    stop = functools.partial(_end, os.getpid(), workers)
    if workers:
        atexit.register(stop)
    _note_deaths()
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # The loader itself says only that a worker ended, torch's handler of signals also how.
        said = _deaths.pop() if _deaths else str(error)
        _deaths.clear()
        raise DataError(f"a process that reads {name!r} ended: {said.split('. ')[0]}. Give fewer workers") from error
    finally:
        del batches  # asks the workers to end, unless the garbage collector has closed their queues already
        if workers:  # where the interpreter has ended them, modules may be gone, too
            atexit.unregister(stop)
            stop()


def _end(owner: int, workers: list[multiprocessing.process.BaseProcess]) -> None:
    """End workers that still run. At its exit, Python would wait for ever for those that ignore its SIGTERM."""
    while workers:
        worker = workers.pop()
        if os.getpid() == owner and worker.is_alive():  # a forked child's exit leaves its parent's workers alone
            worker.kill()
            worker.join()
            _deaths.clear()


def _begin(_worker: int) -> None:
    # Ctrl-C, and SIGTERM of a batch system, reach all processes; the main one still needs batches to end its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # torch watches the parent process, which is not the main one if a fork server started this one.
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _note_deaths() -> None:
    """Keep the handler of SIGCHLD that torch installs from raising an error in the middle of a step or of a write.

    Loaders look for dead workers, too, when they have waited for a batch for five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", None) != signal_handling.__name__:
        return

    def note(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            _deaths.append(str(error))

    signal.signal(signal.SIGCHLD, note)
