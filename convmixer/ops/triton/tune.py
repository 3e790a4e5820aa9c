"""Measure the tiles of the Triton kernels on the GPU at hand, and keep the fastest.

    python -m convmixer.ops.triton.tune                 # the blocks of the registry's variants, in under three minutes
    python -m convmixer.ops.triton.tune 64x1536x32x32k9 --dtype float16

Processes compile candidates first, the promising ones before others, until their time is up. Then one process measures
what was compiled, with nothing else on the GPU, several calls to a CUDA graph. The fastest rows go to
`tables.tuned_file`, where the kernels of this user look first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import operator
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from convmixer.errors import ArgumentError
from convmixer.files import write_atomically
from convmixer.hardware import usable_cores
from convmixer.ops.triton import launch, tables
from convmixer.ops.triton.tables import (
    Direct,
    Elementwise,
    Gemm,
    Gradient,
    Library,
    Row,
    Sums,
    pointwise_key,
    tuned_file,
)

SECONDS_TO_COMPILE, SECONDS_TO_MEASURE = 90, 75


class Block(NamedTuple):
    """Activations (batch, channels, height, width) and the depthwise kernel of one block."""

    batch: int
    channels: int
    height: int
    width: int
    kernel_size: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}k{self.kernel_size}"


# Training and inference of the variants, in batches that fill a large GPU, and single images.
BLOCKS = (
    Block(64, 1536, 32, 32, 9),
    Block(128, 768, 32, 32, 7),
    Block(256, 256, 16, 16, 5),
    Block(128, 256, 32, 32, 9),
    Block(1, 1536, 32, 32, 9),
    Block(1, 768, 32, 32, 7),
    Block(1, 256, 16, 16, 5),
)


class Task(NamedTuple):
    """One tile of one operation on one block."""

    operation: str
    key: int
    block: Block
    row: Row


# ---- what is tried --------------------------------------------------------------------------------------------------


def _depthwise(block: Block) -> Iterator[Row]:
    for channels, warps, across in (
        (64, 4, 1),
        (64, 1, 1),
        (32, 2, 1),
        (64, 4, 2),
        (64, 2, 1),
        (32, 4, 1),
        (128, 4, 1),
    ):
        for rows, columns in ((2, 8), (1, 16), (2, 16), (3, 8)):
            if columns * across <= max(block.width, 8) and rows < block.kernel_size:
                yield Direct(rows, columns, warps * 64 // channels // across, across, channels, warps)


def _gradient(block: Block) -> Iterator[Row]:
    for groups, channels, warps in ((4, 64, 4), (4, 32, 2), (8, 32, 4), (8, 64, 8)):
        for rows, columns in ((3, 16), (2, 16), (3, 8)):
            if columns <= max(block.width, 8) and rows <= block.kernel_size:
                yield Gradient(rows, columns, groups, channels, warps)


def _product(_block: Block) -> Iterator[Row]:
    yield Gemm(128, 128, 64, 4, 3, apart=True)
    yield Library()
    yield Gemm(128, 256, 64, 8, 3, apart=True)
    yield Gemm(128, 128, 64, 8, 3, apart=True)
    yield Gemm(128, 128, 64, 4, 4, apart=True)
    yield Gemm(256, 128, 64, 8, 3, apart=True)
    yield Gemm(64, 128, 64, 4, 4, apart=True)
    yield Gemm(64, 64, 64, 4, 4, apart=True)
    yield Gemm(64, 256, 64, 4, 3)
    yield Gemm(128, 128, 64, 4, 3)


def _elementwise(_block: Block) -> Iterator[Row]:
    for rows, channels, warps in ((16, 128, 4), (8, 128, 4), (32, 64, 4), (16, 256, 4), (32, 128, 4), (8, 256, 4)):
        yield Elementwise(rows, channels, warps)


def _sums(_block: Block) -> Iterator[Row]:
    for rows, channels, warps in ((8, 128, 4), (16, 128, 4), (8, 256, 4), (16, 128, 8), (16, 64, 4), (4, 256, 4)):
        for programs in (528, 1056, 2112):
            yield Sums(rows, channels, warps, programs)


# Rows of each operation, and the keys by which the tables hold them.
CANDIDATES: dict[str, tuple[Callable[[Block], Iterator[Row]], Callable[[Block], Sequence[int]]]] = {
    "depthwise": (_depthwise, lambda block: (block.kernel_size,)),
    "weight_gradient": (_gradient, lambda block: (block.kernel_size,)),
    "pointwise": (_product, lambda block: [pointwise_key(block.channels, formed) for formed in (False, True)]),
    "normalize": (_elementwise, lambda _: (0, 1)),
    "sums": (_sums, lambda _: (0, 1, 2)),
}


def tasks(blocks: Iterable[Block]) -> list[Task]:
    """List every candidate of every operation: the most promising one of each, then the next one of each."""
    ranked: list[tuple[int, Task]] = []
    for block in blocks:
        for operation, (rows, keys) in CANDIDATES.items():
            for key in keys(block):
                ranked += [(rank, Task(operation, key, block, row)) for rank, row in enumerate(rows(block))]
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def call(task: Task, dtype: torch.dtype) -> Callable[[], Any]:
    """Build a call of the operation with random operands on the GPU, by the task's row."""
    batch, channels, height, width, size = task.block
    x = torch.randn(batch, channels, height, width, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    vector = torch.rand(channels, device="cuda")
    row: Any = task.row
    if task.operation == "depthwise":
        weight = torch.randn(channels, 1, size, size, device="cuda", dtype=dtype) / size
        return lambda: launch._convolve(x, weight, vector, "gelu", center=vector, config=row)
    if task.operation == "weight_gradient":
        return lambda: launch._correlate(x, x, size, row)
    if task.operation == "pointwise":
        weight = torch.randn(channels, channels, device="cuda", dtype=dtype) / channels**0.5
        if task.key < 2:
            return lambda: launch._multiply(x, weight, vector, "gelu", scale=vector, shift=vector, config=row)
        return lambda: launch._multiply(x, weight, vector, "gelu", (vector, vector, x), vector, config=row)
    if task.operation == "normalize":
        second: dict[str, Any] = {"x": x, "scale_x": vector, "shift_x": vector, "act_x": "gelu"} if task.key else {}
        return lambda: launch._normalize(x, "gelu", vector, vector, config=row, **second)
    vectors = [{"scale": vector}, {"center": vector, "grad_s": vector, "grad_q": vector}, {"center": vector}][task.key]
    return lambda: launch._sums(task.key, x, "gelu", None if task.key == 2 else x, config=row, **vectors)


# ---- compilation ----------------------------------------------------------------------------------------------------


def _compile(share: list[Task], dtype: torch.dtype, seconds: float) -> list[Task]:
    """Compile for Triton's cache until the time is up; nothing runs, and no memory of the GPU is used.

    Returns:
        What has been compiled, or needs no compilation.
    """
    from torch._subclasses import FakeTensorMode

    def warm(kernel: Any, grid: Any, *arguments: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        kinds = [a.dtype if isinstance(a, Tensor) else a for a in arguments]
        kernel.warmup(*kinds, grid=grid, **constants, **launch.options(warps, stages))

    end, done = time.monotonic() + seconds, []
    with mock.patch.object(launch, "_launch", warm):
        for task in share:
            if time.monotonic() > end:
                break
            try:
                with FakeTensorMode():
                    call(task, dtype)()
            except Exception as error:  # a tile that this GPU has no room for
                print(f"{task}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            else:
                done.append(task)
    return done


def compile_all(todo: list[Task], dtype: torch.dtype, seconds: float, workers: int) -> list[Task]:
    """Run `_compile` in several processes, which share the candidates."""
    if workers == 1:
        return _compile(todo, dtype, seconds)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile, todo[i::workers], dtype, seconds) for i in range(workers)]
        done = {task for future in futures for task in future.result()}
    return [task for task in todo if task in done]


# ---- measurement ----------------------------------------------------------------------------------------------------


def microseconds(function: Callable[[], Any], calls: int = 5, rounds: int = 5) -> float:
    """Measure the median time of a call on the GPU, without launches: several calls are one CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / calls)
    return float(statistics.median(times))


def _differ(one: Any, other: Any) -> bool:
    """Return whether two rows' results differ by more than rounding."""
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return any(a.numel() and not (a.float() - b.float()).norm() <= 0.01 * b.float().norm() for a, b in pairs)


def measure_all(
    todo: list[Task], dtype: torch.dtype, seconds: float, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure all rows, those of one operation and block together, the fastest first in each.

    A row whose result differs from the first one's is left out, and reported.
    """
    groups: dict[tuple[str, int, Block], list[Task]] = {}
    for task in todo:
        groups.setdefault(task[:3], []).append(task)
    end, found = time.monotonic() + seconds, []
    for (operation, key, block), group in groups.items():
        if time.monotonic() > end:
            report(f"no time is left for {operation} {key} of {block}")
            continue
        times: list[tuple[float, Row]] = []
        expected = None
        for task in group:
            try:
                torch.manual_seed(0)  # the same operands for all
                function = call(task, dtype)
                result = function()
                expected = result if expected is None else expected
                if _differ(result, expected):
                    report(f"wrong result, left out: {task}")
                    continue
                times.append((microseconds(function), task.row))
            except Exception as error:
                report(f"left out: {task}: {type(error).__name__}: {str(error)[:100]}")
                torch.cuda.synchronize()
        if not times:
            continue
        times.sort(key=lambda pair: pair[0])
        best, row = times[0]
        report(f"{operation} {key} of {block}: {best:.1f} us by {row}, {len(times)} tried")
        found.append(
            {
                "operation": operation,
                "key": key,
                "bytes": dtype.itemsize,
                "channels": block.channels,
                "positions": block.batch * block.height * block.width,
                "form": type(row).__name__,
                "row": list(row),
                "microseconds": round(best, 2),
                "others": [[round(us, 2), type(other).__name__, list(other)] for us, other in times[1:]],
            }
        )
    return found


def tune(
    blocks: Sequence[Block] = BLOCKS,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seconds: tuple[float, float] = (SECONDS_TO_COMPILE, SECONDS_TO_MEASURE),
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Compile and measure candidates for some blocks, and write the fastest rows for the kernels to find.

    Args:
        blocks: Shapes of activations and their kernel sizes.
        dtype: Of activations and weights.
        seconds: At most, of compiling and of measuring.
        workers: Processes that compile; by default one for each processor core.
        report: Takes each line of text.

    Returns:
        The file: rows that it holds for other shapes or types stay in it.

    Raises:
        ArgumentError: There is no CUDA device, or no folder that keeps the rows.
    """
    if not torch.cuda.is_available():
        raise ArgumentError("no CUDA device: the Triton kernels are measured on the GPU that they will run on")
    name = torch.cuda.get_device_name()
    _check_folder(name)
    workers = workers or usable_cores()
    todo = tasks(blocks)
    begin = time.monotonic()
    done = compile_all(todo, dtype, seconds[0], workers)
    report(f"{len(done)} of {len(todo)} candidates compiled by {workers} processes in {time.monotonic() - begin:.0f} s")
    found = measure_all(done, dtype, seconds[1], report)
    file = write_rows(name, found)
    report(f"{len(found)} rows written to {file}")
    return file


def _check_folder(name: str) -> None:
    """Raise ArgumentError before minutes of work whose rows could not be kept."""
    try:
        folder = tuned_file(name).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # no place, or no home
        advice = "set XDG_CACHE_HOME to a folder that takes files"
        raise ArgumentError(f"rows cannot be kept ({error}): {advice}") from error


def write_rows(name: str, found: list[dict[str, Any]]) -> Path:
    """Write rows for a GPU of that name into its file, in which those for other shapes or types stay."""
    tables.tuned.cache_clear()  # another process may have written since
    block = operator.itemgetter("operation", "key", "bytes", "channels", "positions")
    rows = {block(record): record for record in [*tables.tuned(name), *found]}
    file = tuned_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"torch": torch.__version__, "rows": list(rows.values())}, indent=1) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    tables.forget_choices()
    return file


def _block(text: str) -> Block:
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)k(\d+)", text)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text!r}: give BATCHxCHANNELSxHEIGHTxWIDTHkKERNEL such as {BLOCKS[0]}")
    return Block(*map(int, numbers.groups()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", type=_block, default=BLOCKS, help=f"such as {BLOCKS[0]}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, nargs=2, default=(SECONDS_TO_COMPILE, SECONDS_TO_MEASURE))
    arguments = parser.parse_args()
    try:
        tune(arguments.blocks, getattr(torch, arguments.dtype), seconds=tuple(arguments.seconds))
    except ArgumentError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
