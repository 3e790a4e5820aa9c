"""Processes that decode images ahead of the model."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from convmixer.errors import DataError
from convmixer.hardware import usable_cores


def default_workers() -> int:
    """Return the processor cores for each of the processes that train on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def leave_signals_to_the_main_process(_worker: int) -> None:
    # Ctrl-C, and SIGTERM of a batch system, reach all processes; the main one still needs batches to end its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def watching_workers(name: str) -> Iterator[None]:
    """Make a DataError, with the name of the data, of the death of a worker of a DataLoader within the block."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a process that reads {name!r} ended: {error}. Give fewer workers") from error
