"""How long one image takes: with nothing else to do, among other runtimes, and while another program is busy.

    python benchmarks/latency.py [convmixer_256_8] [--calls 400] [--dtype bfloat16 ...] [--json FILE]

"alone": the calls of a runtime follow one another. "turns": the runtimes take turns, one call each, so that each finds
the threads and caches as the others left them. "busy": they take turns, and a second process keeps one core busy.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import torch

import convmixer
from convmixer.runtime.benchmark_cases import DTYPES, timm_candidates

PEERS = ("timm eager", "timm onnxruntime", "timm openvino")
SHARES = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)


def make_calls(model: Any, image: torch.Tensor, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return calls of the native backend with all threads and with one, and of timm's model as others run it."""
    calls: dict[str, Callable[[], Any]] = {}
    inputs = image.to(DTYPES[dtype])
    for threads in (torch.get_num_threads(), 1):
        optimized = convmixer.optimize(model, backend="native", dtype=dtype, threads=threads)
        name = f"convmixer native, {threads} thread{'s' if threads > 1 else ''}"
        calls[name] = functools.partial(optimized, inputs)
    peers = {peer.name: peer for peer in timm_candidates(model, image, [dtype])}
    return calls | {name: peers[name].make()[0] for name in PEERS if name in peers}


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as loop:
        loop.stdout.readline()
        try:
            yield
        finally:
            loop.kill()


def quantiles(seconds: list[float]) -> dict[str, float]:
    values = 1000 * torch.tensor(seconds, dtype=torch.float64).quantile(SHARES)
    return dict(zip(("p50", "p90", "p99"), values.tolist(), strict=True))


def measure(calls: dict[str, Callable[[], Any]], count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds by load, runtime and share of the calls."""
    take_turns = functools.partial(harness.take_turns, rounds=count, warm_up=count // 10)
    alone = {name: take_turns({name: call})[name] for name, call in calls.items()}
    turns = take_turns(calls)
    with busy_core():
        busy = take_turns(calls)
    by_load = {"alone": alone, "turns": turns, "busy": busy}
    return {load: {name: quantiles(times) for name, times in found.items()} for load, found in by_load.items()}


def parse() -> argparse.Namespace:
    parser = harness.arguments(__doc__)
    parser.add_argument("model", nargs="?", default="convmixer_256_8")
    parser.add_argument("--calls", type=int, default=400, help="of each runtime, under each load")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    options = parse()
    model = convmixer.create_model(options.model, device="cpu").eval()
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    found = {}
    for dtype in options.dtype:
        found[dtype] = measure(make_calls(model, image, dtype), options.calls)
        for load, rows in found[dtype].items():
            for name, times in rows.items():
                print(f"{dtype:8} {load:5} {name:30}", *(f"{share} {value:7.2f} ms" for share, value in times.items()))
    harness.write(options.json, {"model": options.model, "calls": options.calls, "milliseconds": found})


if __name__ == "__main__":
    main()
