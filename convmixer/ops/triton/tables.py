"""Which tile each Triton kernel computes with: rows that were measured or guessed, and those that `tune` has found.

A row is chosen by the operation, the GPU, what else decides (the kernel size of a depthwise convolution, say) and the
bytes of an element. `convmixer.ops.triton.tune` measures candidates on the GPU at hand and writes the fastest to a file
in the user's cache; where that file has a row for a shape of about the size, it goes before the tables of this module.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convmixer.errors import ArgumentError
from convmixer.ops.limits import KERNEL_SIZES


class Direct(NamedTuple):
    """Of `depthwise`: a program computes `down` x `across` groups of `rows` x `columns` outputs, of `channels`."""

    rows: int
    columns: int
    down: int
    across: int
    channels: int
    warps: int


class Gradient(NamedTuple):
    """Of `depthwise_weight_gradient`: `kernel_rows` of the kernel, summed over tiles of `groups` x `columns`."""

    kernel_rows: int
    columns: int
    groups: int
    channels: int
    warps: int


class Gemm(NamedTuple):
    """Of `pointwise`: a program's tile of `rows` positions x `outputs`, in steps of `inputs` channels.

    `apart`: z is formed by a pass of its own before, and not by each program.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    apart: bool = False


class Library(NamedTuple):
    """The 1x1 convolution by cuBLAS, with passes before and after it."""


class Elementwise(NamedTuple):
    """Of `normalize`: a program's tile of `rows` positions x `channels`."""

    rows: int
    channels: int
    warps: int


class Sums(NamedTuple):
    """Of `sums_of_tiles`: the same, one tile after the other in about `programs` programs per block of channels."""

    rows: int
    channels: int
    warps: int
    programs: int


FORMS = {form.__name__: form for form in (Direct, Gradient, Gemm, Library, Elementwise, Sums)}
Row = Direct | Gradient | Gemm | Library | Elementwise | Sums
Table = dict[tuple[int, int, int], Row]

# By compute capability (the nearest below counts), what else decides, and bytes of an element. What a GPU of 9.0 takes
# in bfloat16 was chosen among rows that `tune` measured on an H200 (torch 2.11.0, triton 3.6.0) for 256, 768 and 1536
# channels: none is more than 8 % slower than the best one for a shape. The other rows were never measured.
DEPTHWISE: Table = {(80, size, itemsize): Direct(2, 8, 1, 1, 64, 1) for size in KERNEL_SIZES for itemsize in (2, 4)}
WEIGHT_GRADIENT: Table = {
    (80, size, itemsize): Gradient(2 if size in (6, 7) else 3, 16, 4, 32, 2)
    for size in KERNEL_SIZES
    for itemsize in (2, 4)
}
# By `pointwise_key`.
POINTWISE: Table = {
    # 12.0 has the shared memory of 8.6, and 10.0 another matrix multiplication, with an accumulator of its own.
    **{(capability, z, 2): Gemm(128, 128, 32, 8, 3, z > 1) for capability in (80, 120) for z in range(4)},
    **{(capability, z, 4): Gemm(64, 64, 32, 4, 2, z > 1) for capability in (80, 120) for z in range(4)},
    (90, 0, 2): Gemm(128, 128, 64, 8, 3),
    (90, 1, 2): Gemm(128, 256, 64, 8, 3),
    (90, 2, 2): Gemm(128, 128, 64, 4, 3, apart=True),
    (90, 3, 2): Gemm(128, 128, 64, 8, 3, apart=True),
    **{(100, z, 2): Gemm(128, 128, 64, 8, 3, z > 1) for z in range(4)},
    **{(capability, z, 4): Gemm(64, 128, 32, 8, 2, z > 1) for capability in (90, 100) for z in range(4)},
}
# Of one tensor (0), or of two (1).
NORMALIZE: Table = {(80, inputs, itemsize): Elementwise(16, 128, 4) for inputs in (0, 1) for itemsize in (2, 4)}
# Of `normalize_act_grad` (0), `stats_grad` (1), `stats` (2).
SUMS: Table = {
    (80, what, itemsize): Sums(16, 64, 4, 1056) if what == 2 else Sums(16, 128, 4, 528)
    for what in range(3)
    for itemsize in (2, 4)
}
_LOGGER = logging.getLogger(__name__)
TABLES = {
    "depthwise": DEPTHWISE,
    "weight_gradient": WEIGHT_GRADIENT,
    "pointwise": POINTWISE,
    "normalize": NORMALIZE,
    "sums": SUMS,
}


def pointwise_key(outputs: int, formed: bool) -> int:
    """Return the key of a row: 0 where z is given, 1 for more than 1024 outputs; 2 where z is formed of c and x, 3 for
    more than 256 outputs.
    """
    return 2 + (outputs > 256) if formed else int(outputs > 1024)


def row(operation: str, key: int, tensor: Tensor) -> Any:
    """Return the row of an operation for a tensor (B, C, H, W).

    Raises:
        ArgumentError: A GPU below compute capability 8.0.
    """
    index = tensor.device.index if tensor.is_cuda else None
    channels = tensor.shape[1]
    return _row(operation, key, tensor.element_size(), channels, tensor.numel() // max(channels, 1), index)


@functools.lru_cache(maxsize=4096)
def _row(operation: str, key: int, itemsize: int, channels: int, positions: int, device: int | None) -> Row:
    major, minor = (9, 0) if device is None else torch.cuda.get_device_capability(device)
    records = [] if device is None else tuned(torch.cuda.get_device_name(device))
    near: list[tuple[float, Row]] = []
    for record in records:
        if (record["operation"], record["key"], record["bytes"]) == (operation, key, itemsize):
            ratios = (record["channels"] / max(channels, 1), record["positions"] / max(positions, 1))
            near.append((sum(abs(math.log(ratio)) for ratio in ratios), FORMS[record["form"]](*record["row"])))
    if near:
        distance, found = min(near, key=lambda pair: pair[0])
        if distance <= math.log(8):
            return found
    table = TABLES[operation]
    below = [known[0] for known in table if known[0] <= 10 * major + minor]
    if not below:
        raise ArgumentError(f"compute capability {major}.{minor}: the Triton kernels need a GPU of at least 8.0")
    return table[max(below), key, itemsize]


# ---- rows found by `tune` -------------------------------------------------------------------------------------------


def tuned_file(name: str) -> Path:
    """Return the file in which `tune` writes the rows of a GPU of that name, for the installed Triton."""
    import triton

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convmixer"
    return folder / f"kernels-{name.replace(' ', '-')}-triton-{triton.__version__}.json"


@functools.lru_cache(maxsize=8)
def tuned(name: str) -> list[dict[str, Any]]:
    """Read the records that `tune` has written for a GPU of that name; none if there are none or they make no sense."""
    try:
        file = tuned_file(name)
    except RuntimeError:  # no home, in which nothing can have been kept
        return []
    try:
        records = json.loads(file.read_text())["rows"]
        for record in records:
            _check_record(record)
    except FileNotFoundError:
        return []
    except Exception as error:
        _LOGGER.warning(
            "%s is left out (%s: %s): run convmixer.ops.triton.tune again", file, type(error).__name__, error
        )
        return []
    return list(records)


def _check_record(record: dict[str, Any]) -> None:
    """Raise an error for a record that no kernel could be launched by."""
    known = {type(row) for row in TABLES[record["operation"]].values()}
    form = FORMS[record["form"]]
    if form not in known | ({Library} if Gemm in known else set()):
        raise ValueError(f"{record['form']} is no form of {record['operation']}")
    for number in (*(record[name] for name in ("key", "bytes", "channels", "positions")), *form(*record["row"])):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{number!r} is not a whole number")
    if min(record["channels"], record["positions"]) < 1:
        raise ValueError("no channels, or no positions")


def forget_choices() -> None:
    """Choose anew, from the file and the tables as they are now."""
    tuned.cache_clear()
    _row.cache_clear()
