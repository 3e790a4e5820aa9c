"""Time and memory of a call on a device."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def time_calls(call: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Call until the calls took `seconds` together, and return the seconds of each; one call before is not timed."""
    call()
    if device.type == "cuda":
        return _time_on_cuda(call, seconds, device)
    taken: list[float] = []
    total = 0.0
    while total < seconds:
        begun = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - begun)
        total += taken[-1]
    return taken


def _time_on_cuda(call: Callable[[], Any], seconds: float, device: torch.device) -> list[float]:
    """Time by events on the device, twice as many calls each time that it is asked."""
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)  # of a device that need not be the current one
    taken: list[float] = []
    repeats = 8
    while sum(taken) < seconds:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            begin.record(stream)
            call()
            end.record(stream)
        torch.cuda.synchronize(device)
        taken += [begin.elapsed_time(end) / 1000 for begin, end in events]
        repeats *= 2
    return taken


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PeakMemory:
    """Growth of the peak of memory from the construction on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 2**20
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> float:
        try:
            found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        except OSError:
            found = None
        return int(found[1]) / 1024 if found else float("nan")

    def growth(self) -> float | None:
        """Return it in MiB; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        grown = self._status("VmHWM") - self.before
        return max(grown, 0.0) if grown == grown else None
