"""How many threads compute the next call."""

from __future__ import annotations

import os
import time

SLOW, LEAST = 2.0, 1e-3  # a call was held up if it took longer than SLOW times the fastest one and LEAST seconds
SHORTEST_BREAK, LONGEST_BREAK = 0.05, 5.0  # seconds
RECOVERY = 0.95  # by which a call that was not held up shortens the next break

Shape = tuple[int, ...]

_forked = False


def _after_fork() -> None:
    """Compute in one thread from now on: OpenMP would wait for threads that are gone."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_forked() -> bool:
    """Return whether this process is a child by fork."""
    return _forked


class ThreadCount:
    """All threads, or one for a while after a call in which another program kept a thread from its core.

    Threads that share an image wait for one another several times in each block, so a late one holds up the others each
    time: a call of 1 ms takes up to 80. A single thread waits for none, and computes the same bits.
    The break gets longer as long as other programs keep the cores busy.

    Args:
        most: All threads.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._fastest: dict[Shape, float] = {}
        self._break, self._until = SHORTEST_BREAK, 0.0

    def next(self) -> int:
        """Return the number of threads for a call that begins now."""
        return 1 if _forked or time.perf_counter() < self._until else self.most

    def note(self, shape: Shape, threads: int, seconds: float) -> None:
        """Take down how long a call for images of a shape took."""
        if threads == 1:
            return
        if len(self._fastest) > 1000:  # sizes of images
            self._fastest.clear()
        fastest = self._fastest[shape] = min(seconds, self._fastest.get(shape, seconds))
        if seconds < SLOW * fastest + LEAST:
            self._break = max(SHORTEST_BREAK, RECOVERY * self._break)
        else:
            self._until = time.perf_counter() + self._break
            self._break = min(LONGEST_BREAK, 2 * self._break)
