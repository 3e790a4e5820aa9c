"""Kernels and whole models on a GPU, in one command under ten minutes: ours, cuDNN's and timm's, and an H200's limits.

    python benchmarks/gpu.py --json FILE [--minutes 9] [--data FOLDER] [--only REGEX]
    python benchmarks/gpu.py --table FILE
    python benchmarks/gpu.py --dry-run

Several processes compile what will be measured, for a third of the time at most. Then one process measures, what
matters most first. Everything is in bfloat16 with random weights. A training step is forward, backward and AdamW; it
is measured as it is launched, and as one CUDA graph where it can be captured. Kernels are timed by graphs of several
calls, next to the time at an H200's roof. With `--data`, `convmixer train` runs for two epochs, of which the second one
counts. What the minutes do not reach is listed as left out, what fails with its error. The file is written after each
step, and tables in Markdown are printed at the end. A dry run computes tiny shapes anywhere, in Triton's interpreter,
which shows that all of it runs.
"""

# ruff: noqa: E402
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import harness
import timm
import torch
import torch.nn.functional as F
import triton
from harness import H200_CORES, H200_MEMORY, H200_TENSOR_CORES
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

import convmixer
from convmixer.model import activation
from convmixer.ops.triton import launch as ops
from convmixer.registry import get_variant

DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float16 if DRY else torch.bfloat16  # the interpreter cannot multiply matrices of bfloat16
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Model(NamedTuple):
    """Arguments of a model, the side of its images, and how many are in a training step."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act: type[nn.Module]
    side: int
    classes: int
    batch: int


def registered(name: str, batch: int) -> Model:
    v, _ = get_variant(name)
    sizes = (v.dim, v.depth, v.kernel_size, v.patch_size, activation(v.act_layer), v.input_size[1], v.num_classes)
    return Model(*sizes, batch)


BATCHES = {"convmixer_1536_20": 64, "convmixer_768_32": 128, "convmixer_256_8": 1024, "convmixer_256_8_ks9_p1": 256}
MODELS = {name: registered(name, batch) for name, batch in BATCHES.items()}
if DRY:
    MODELS = {"tiny": Model(8, 2, 3, 2, nn.GELU, 8, 3, 2)}


class Job(NamedTuple):
    """One measurement; `compiles` marks those for which processes may compile ahead."""

    section: str
    name: str
    compiles: bool
    measure: Callable[[], Any]


# ---- time -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], least: float) -> float:
    """Return the median time of a call in seconds, after two untimed ones."""
    for _ in range(1 if DRY else 2):
        call()
    if DRY:
        return float("nan")
    torch.cuda.synchronize()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def captured(call: Callable[[], Any], calls: int = 1) -> Callable[[], Any]:
    """Capture some calls as one CUDA graph."""
    if DRY:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay  # type: ignore[no-any-return]


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return float("nan") if DRY else torch.cuda.max_memory_allocated() / 2**20


# ---- models ---------------------------------------------------------------------------------------------------------


def build(name: str, ours: bool, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    dim, depth, size, patch, act, _, classes, _ = MODELS[name]
    kind = convmixer.ConvMixer if ours else TimmConvMixer
    model = kind(dim=dim, depth=depth, kernel_size=size, patch_size=patch, num_classes=classes, act_layer=act)
    return model.to(DEVICE, memory_format=layout)


def images(name: str, batch: int, layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    side = MODELS[name].side
    return torch.randn(batch, 3, side, side, device=DEVICE).to(dtype).contiguous(memory_format=layout)


def compiled(model: nn.Module, moves: bool = True) -> Any:
    """Compile a model with or without TorchInductor's layout optimisation."""
    if DRY:
        return torch.compile(model, backend="aot_eager")
    return torch.compile(model, options={"layout_optimization": moves}, dynamic=False)


def infer(
    name: str, make: Callable[[], Any], layout: torch.memory_format, batch: int | None = None
) -> dict[str, float]:
    model, batch = make(), batch or 2 * MODELS[name].batch
    x = images(name, batch, layout, DTYPE)
    with torch.no_grad():
        time_of_one = seconds(lambda: model(x), 0.5)
    return {"images_per_second": batch / time_of_one, "batch": batch, "peak_mib": peak()}


def train(name: str, model: nn.Module, run: Callable[[Tensor], Tensor], layout: torch.memory_format) -> dict[str, Any]:
    """Time a training step, launched one kernel after the other and as a graph; peak memory is the former's."""
    batch = MODELS[name].batch
    x = images(name, batch, layout, torch.float32)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    fast: dict[str, Any] = {} if DRY else {"fused": True, "capturable": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-4, device=DEVICE), **fast)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(DEVICE, DTYPE):
            loss = F.cross_entropy(run(x).float(), labels)
        loss.backward()
        optimizer.step()

    found: dict[str, Any] = {"images_per_second": batch / seconds(step, 0.5), "batch": batch, "peak_mib": peak()}
    try:
        found["graph_images_per_second"] = batch / seconds(captured(step), 0.5)
    except Exception as error:
        found["graph"] = f"{type(error).__name__}: {error}"[:200]
    return found


def largest(name: str, make: Callable[[], nn.Module]) -> int:
    """Find the largest power of two of images whose forward and backward pass fits in memory, without an optimizer."""
    batch = 0
    for power in range(2 if DRY else 16):
        try:
            model = make()
            x = images(name, 2**power, torch.channels_last, torch.float32)
            with torch.autocast(DEVICE, DTYPE):
                model(x).float().sum().backward()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            free()
        batch = 2**power
    return batch


def fused(name: str) -> Any:
    model: Any = build(name, True)
    model.set_fused(True)
    return model


def optimized(name: str, backend: str) -> Any:
    return convmixer.optimize(build(name, True).eval(), backend=backend, dtype=DTYPE)


def model_jobs(name: str) -> Iterator[Job]:
    last = torch.channels_last

    def ours(section: str, what: str, measure: Callable[[], Any], compiles: bool = True) -> Job:
        return Job(f"{section} of {name}", what, compiles, measure)

    def step(model: nn.Module, compile: bool, layout: torch.memory_format = last, moves: bool = True) -> Any:
        return train(name, model, compiled(model, moves) if compile else model, layout)

    def accelerated() -> nn.Module:
        return convmixer.accelerate(build(name, False))

    yield ours("training", "ours, fused", lambda: step(fused(name), False))
    yield ours("training", "ours, fused, compiled", lambda: step(fused(name), True))
    yield ours("training", "ours, layers, compiled", lambda: step(build(name, True), True))
    yield ours("training", "ours, layers", lambda: step(build(name, True), False))
    yield ours("training", "timm's class after accelerate, compiled", lambda: step(accelerated(), True))
    plain = torch.contiguous_format
    best = plain if MODELS[name].kernel_size == 9 else last
    yield ours("training", "timm compiled, default", lambda: step(build(name, False, plain), True, plain))
    yield ours("training", "timm compiled, layout kept", lambda: step(build(name, False, best), True, best, False))
    for what, layout in LAYOUTS.items():
        yield ours("training", f"timm {what}", lambda o=layout: step(build(name, False, o), False, o), False)
    for backend in ("triton", "eager") if DRY else ("triton", "compile", "eager"):
        yield ours("inference", f"ours, {backend}", lambda b=backend: infer(name, lambda: optimized(name, b), last))
    yield ours(
        "inference", "timm compiled, default", lambda: infer(name, lambda: compiled(timm_eval(name)), LAYOUTS["NCHW"])
    )
    yield ours(
        "inference",
        "timm compiled, layout kept",
        lambda: infer(name, lambda: compiled(timm_eval(name, best), False), best),
    )
    for what, layout in LAYOUTS.items():
        yield ours(
            "inference", f"timm {what}", lambda o=layout: infer(name, lambda: timm_eval(name, o), o), compiles=False
        )
    for backend in ("triton",) if DRY else ("triton", "compile", "auto"):
        yield ours(
            "inference of one image",
            f"ours, {backend}",
            lambda b=backend: infer(name, lambda: optimized(name, b), last, 1),
        )
    yield ours("inference of one image", "timm", lambda: infer(name, lambda: timm_eval(name), last, 1), compiles=False)


def timm_eval(name: str, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    return build(name, False, layout).to(DTYPE).eval()


def memory_jobs(name: str) -> Iterator[Job]:
    section = f"largest batch of {name}"
    yield Job(section, "ours, fused", True, lambda: largest(name, lambda: fused(name)))
    yield Job(section, "timm channels_last", False, lambda: largest(name, lambda: build(name, False)))


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernel_jobs(name: str) -> Iterator[Job]:
    """Yield each operation of a block, and what PyTorch has for it, for the images of a training step."""
    dim, _, size, patch, _, side, _, batch = MODELS[name]
    side, before, after = side // patch, (size - 1) // 2, size // 2

    @functools.lru_cache
    def operands() -> tuple[Tensor, ...]:
        plain = torch.randn(batch, dim, side, side, device=DEVICE).to(DTYPE)
        weight, square = (torch.randn(s, device=DEVICE).to(DTYPE) for s in ((dim, 1, size, size), (dim, dim)))
        last = plain.contiguous(memory_format=torch.channels_last)
        return plain, last, weight / size, square / dim**0.5, torch.rand(dim, device=DEVICE)

    values = batch * dim * side * side
    tensor, taps, products = 2 * values, 2 * size * size * values / H200_CORES, 2 * dim * values / H200_TENSOR_CORES

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        if before != after:
            x = F.pad(x, (before, after, before, after))
        return F.conv2d(x, weight, padding=before if before == after else 0, groups=dim)

    def backward(x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        pads = [before, before]
        return torch.ops.aten.convolution_backward(x, x, weight, None, [1, 1], pads, [1, 1], False, [0, 0], dim, mask)

    ours: dict[str, tuple[float, Callable[..., Any]]] = {
        "depthwise + sums": (
            max(2 * tensor / H200_MEMORY, taps),
            lambda _, x, w, s, v: ops.depthwise(x, w, v, "gelu", v),
        ),
        "depthwise_infer": (
            max(3 * tensor / H200_MEMORY, taps),
            lambda _, x, w, s, v: ops.depthwise_infer(x, w, v, "gelu", v, v, x),
        ),
        "depthwise_input_grad": (
            max(3 * tensor / H200_MEMORY, taps),
            lambda _, x, w, s, v: ops.depthwise_input_grad(x, w, x),
        ),
        "depthwise_weight_grad": (
            max(2 * tensor / H200_MEMORY, taps),
            lambda _, x, w, s, v: ops.depthwise_weight_grad(x, x, size),
        ),
        "pointwise + sums": (
            max(3 * tensor / H200_MEMORY, products),
            lambda _, x, w, s, v: ops.pointwise(x, v, v, x, s, v, "gelu", v),
        ),
        "pointwise_infer": (
            max(2 * tensor / H200_MEMORY, products),
            lambda _, x, w, s, v: ops.pointwise_infer(x, s, v, "gelu", v, v),
        ),
        "sum_normalized": (
            3 * tensor / H200_MEMORY,
            lambda _, x, w, s, v: ops.sum_normalized(x, v, v, "gelu", x, v, v, "gelu"),
        ),
        "normalize_act": (2 * tensor / H200_MEMORY, lambda _, x, w, s, v: ops.normalize_act(x, v, v, "gelu")),
        "normalize_act_grad": (3 * tensor / H200_MEMORY, lambda _, x, w, s, v: ops.normalize_act_grad(x, x, v, "gelu")),
        "stats_grad": (3 * tensor / H200_MEMORY, lambda _, x, w, s, v: ops.stats_grad(x, x, "gelu", v, v, v)),
        "stats": (tensor / H200_MEMORY, lambda _, x, w, s, v: ops.stats(x, "gelu", v)),
    }
    for what, (roof, call) in ours.items():
        yield Job(
            f"kernels of {name}, microseconds",
            what,
            True,
            lambda c=call, r=roof: {"measured": microseconds(lambda: c(*operands())), "h200_roof": 1e6 * r},
        )
    theirs: dict[str, Callable[..., Any]] = {
        "depthwise": lambda x, w, s: convolution(x, w),
        "1x1 convolution": lambda x, w, s: F.conv2d(x, s[:, :, None, None]),
    }
    if before == after:
        theirs["depthwise input gradient"] = lambda x, w, s: backward(x, w, [True, False, False])
        theirs["depthwise weight gradient"] = lambda x, w, s: backward(x, w, [False, True, False])
    for i, layout in enumerate(LAYOUTS):
        for what, call in theirs.items():
            yield Job(
                f"kernels of {name}, microseconds",
                f"PyTorch {layout}: {what}",
                False,
                lambda c=call, i=i: {"measured": microseconds(lambda: c(operands()[i], *operands()[2:4]))},
            )


def microseconds(call: Callable[[], Any], calls: int = 4) -> float:
    return 1e6 * seconds(captured(call, calls), 0.02) / calls


# ---- an epoch of training -------------------------------------------------------------------------------------------


def epoch(data: Path) -> dict[str, float]:
    """Measure images per second of the second epoch of `convmixer train cifar10`, without validation."""
    from convmixer.training import get_recipe
    from convmixer.training import train as run

    recipe = get_recipe("cifar10", epochs=2, validation_fraction=0.1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(recipe, data, Path(folder) / "run", device=DEVICE, report=lambda _: None)
    last = result.history[-1]
    return {"images_per_second": last.images_per_second, "batch": recipe.batch_size}


# ---- report ---------------------------------------------------------------------------------------------------------


def jobs(data: Path | None) -> list[Job]:
    """List all measurements, what matters most first."""
    found: list[Job] = []
    for name in MODELS:
        found += model_jobs(name)
    if data is not None:
        found.append(Job("epoch of convmixer train", "cifar10", True, lambda: epoch(data)))
    for name in MODELS:
        found += kernel_jobs(name)
    return found + [job for name in list(MODELS)[:2] for job in memory_jobs(name)]


def _warm(numbers: list[int], data: Path | None, only: str, end: float) -> int:
    """Run some of the jobs for what they leave in the compilers' caches."""
    global seconds
    seconds = lambda call, least: (call(), 1.0)[1]  # type: ignore[assignment]  # noqa: E731
    todo, done = chosen(data, only), 0
    for number in numbers:
        if time.time() > end:
            break
        with contextlib.suppress(Exception):
            free()
            todo[number].measure()
        done += 1
    return done


def chosen(data: Path | None, only: str) -> list[Job]:
    return [job for job in jobs(data) if re.search(only, f"{job.section}: {job.name}")]


def compile_ahead(data: Path | None, only: str, minutes: float) -> None:
    """Let processes run the jobs that compile, each a part of them, until a third of the time is over."""
    numbers = [i for i, job in enumerate(chosen(data, only)) if job.compiles and "largest" not in job.section]
    workers = min(8, os.cpu_count() or 1)
    end = time.time() + 20 * minutes
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_warm, numbers[i::workers], data, only, end) for i in range(workers)]
        done = sum(future.result() for future in futures)
    print(f"{done} of {len(numbers)} jobs compiled by {workers} processes", flush=True)


def table(content: dict[str, Any]) -> str:
    """Return Markdown with a table for each section."""
    lines = [f"{content['device']}, torch {content['torch']}, triton {content['triton']}, timm {content['timm']}"]
    for section, rows in content["sections"].items():
        columns = list(dict.fromkeys(key for row in rows.values() if isinstance(row, dict) for key in row))
        lines += [
            "",
            f"**{section}**",
            "",
            f"| | {' | '.join(columns) or 'images'} |",
            "| --- |" + " --: |" * (len(columns) or 1),
        ]
        for name, row in rows.items():
            values = [row.get(c, "") for c in columns] if isinstance(row, dict) else [row]
            lines.append(f"| {name} | {' | '.join(f'{v:,.0f}' if isinstance(v, float) else str(v) for v in values)} |")
    for what in ("failed", "left_out"):
        if content[what]:
            lines += ["", f"{what}: {content[what]}"]
    return "\n".join(lines)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--data", type=Path, help="a folder that `convmixer train cifar10` takes")
    parser.add_argument("--only", default="", help="a regular expression: measure what it matches")
    parser.add_argument("--table", type=Path, help="print the tables of a file")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, anywhere")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry-run computes tiny shapes without one")
    begin = time.monotonic()
    content: dict[str, Any] = {
        "device": "cpu, dry run" if DRY else torch.cuda.get_device_name(),
        "dtype": str(DTYPE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
        "sections": {},
        "failed": {},
        "left_out": [],
    }
    if not DRY:
        torch.backends.cudnn.benchmark = True
        compile_ahead(arguments.data, arguments.only, arguments.minutes)
    for job in chosen(arguments.data, arguments.only):
        title = f"{job.section}: {job.name}"
        if time.monotonic() - begin > 60 * arguments.minutes:
            content["left_out"].append(title)
            continue
        free()
        try:
            found = job.measure()
        except Exception as error:
            if DRY:
                raise
            content["failed"][title] = f"{type(error).__name__}: {error}"[:300]
            print(title, content["failed"][title], flush=True)
        else:
            content["sections"].setdefault(job.section, {})[job.name] = found
            print(f"{title}: {found}", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
