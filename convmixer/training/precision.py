"""The precision in which models compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from convmixer.errors import ArgumentError
from convmixer.hardware import bf16_is_faster

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # in accelerate's words
DTYPES = {word: getattr(torch, name) for name, word in PRECISIONS.items()}


def choose_precision(device: torch.device, precision: str) -> str:
    """Return "float32", "bfloat16" or "float16": `precision` itself, or for "auto" the faster of the first two.

    Raises:
        ArgumentError: An unknown precision, or float16 without a GPU.
    """
    if precision == "auto":
        return "bfloat16" if bf16_is_faster(device) else "float32"
    if precision not in PRECISIONS:
        raise ArgumentError(f"unknown precision {precision!r}; valid: auto, {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type != "cuda":
        raise ArgumentError(f"precision 'float16' needs a GPU, not {device.type!r}; valid: auto, float32, bfloat16")
    return precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context that computes in what `choose_precision` chooses."""
    chosen = choose_precision(device, precision)
    return contextlib.nullcontext() if chosen == "float32" else torch.autocast(device.type, getattr(torch, chosen))


@contextlib.contextmanager
def flush_denormals(device: torch.device) -> Iterator[None]:
    """Treat numbers below 1e-38 as zero on a CPU, within the block: with them a step takes up to twice as long."""
    flushing = float(torch.tensor(1e-40, dtype=torch.float32, device="cpu")) == 0
    if device.type == "cpu" and not flushing:
        torch.set_flush_denormal(True)  # in this thread, and in those that it starts from here on
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)
