"""What the benchmarks share: calls timed in turns, shapes of variants, the machine, the file of results.

Machines are noisy, and their speed drifts. So the ways to do a thing take turns in one process, and are compared within
each round: a ratio is the median of the rounds' ratios, not the ratio of two medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from convmixer.registry import get_variant
from convmixer.runtime.benchmark import device_name

# Limits of an H200 per second: operations of the tensor cores in bfloat16, those of the float32 cores, bytes of memory.
H200_TENSOR_CORES, H200_CORES, H200_MEMORY = 790e12, 67e12, 4.3e12


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the docstring of a benchmark, and knows --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


def seconds(call: Callable[[], Any], *, least: float = 0.0, device: torch.device | None = None) -> float:
    """Return the time of a call in seconds: the mean of as many as take `least` seconds, of one by default.

    On a CUDA device the time ends when the device has computed what was called.
    """
    count, begun = 0, time.perf_counter()
    while True:
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        if (taken := time.perf_counter() - begun) >= least:
            return taken / count


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round, after rounds that warm up and do not count.

    Args:
        calls: What is compared, by name.
        rounds: How often each is called and counted.
        warm_up: How often each is called before.
        clock: Calls something and returns its seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            duration = clock(call)
            if number >= warm_up:
                taken[name].append(duration)
    return taken


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return how many times as long `slow` takes: the median of the rounds' ratios."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def feature_side(name: str) -> int:
    """Return the side of a variant's feature maps, in positions, at its own image size."""
    variant, _ = get_variant(name)
    return variant.input_size[1] // variant.patch_size


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a result depends on besides the code: the device, threads, versions and the allocator's settings."""
    facts = {"device": device_name(torch.device(device)), "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return {**facts, **({"GLIBC_TUNABLES": tunables} if tunables else {})}


def write(file: Path | None, record: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Write a record with its machine as JSON, where a file is named."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(device), **record}, indent=2) + "\n", encoding="utf-8")
