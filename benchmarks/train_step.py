"""Images per second of a training step of convmixer_256_8 at 32 pixels: this package against timm.

    python benchmarks/train_step.py [--batch-size 64] [--rounds 9] [--json FILE]

The same weights in timm's class (eager NCHW, eager channels_last, compiled channels_last) and in ours (compiled, as
`convmixer train --compile` runs it). All ways take turns in one process; ratios are medians over rounds, against timm's
best. On Linux with glibc, GLIBC_TUNABLES as in docs/training.md helps all of them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer

import convmixer


def stepper(model: torch.nn.Module, forward: Callable, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, 32, 32)
    labels = torch.randint(10, (arguments.batch_size,))
    last = images.contiguous(memory_format=torch.channels_last)
    state = convmixer.create_model("convmixer_256_8", device="cpu").state_dict()

    def timms(layout: torch.memory_format) -> torch.nn.Module:
        model = TimmConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10)
        model.load_state_dict(state)
        return model.to(memory_format=layout)

    plain, eager, compiled = timms(torch.contiguous_format), timms(torch.channels_last), timms(torch.channels_last)
    ours = convmixer.create_model("convmixer_256_8", device="cpu")
    ours.load_state_dict(state)
    ways = {
        "timm eager NCHW": stepper(plain, plain, images, labels),
        "timm eager channels_last": stepper(eager, eager, last, labels),
        "timm compiled channels_last": stepper(compiled, torch.compile(compiled, dynamic=False), last, labels),
        "convmixer compiled": stepper(ours, torch.compile(ours, dynamic=False), last, labels),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(arguments.rounds + 2):
        for way, step in ways.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:  # the first two rounds compile and warm up
                seconds[way].append(time.perf_counter() - start)
    rates = {way: arguments.batch_size / statistics.median(times) for way, times in seconds.items()}
    best = max((way for way in ways if way.startswith("timm")), key=rates.__getitem__)
    mine = seconds["convmixer compiled"]
    ratio = statistics.median(t / c for t, c in zip(seconds[best], mine, strict=True))
    for way, rate in rates.items():
        print(f"{way:28} {rate:6.1f} images/s")
    print(f"convmixer compiled against {best}: {ratio:.2f}")
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        machine |= {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
        machine |= {"torch": torch.__version__, "timm": timm.__version__}
        result = {"batch_size": arguments.batch_size, "images_per_second": rates, "best_of_timm": best, "ratio": ratio}
        tunables = os.environ.get("GLIBC_TUNABLES", "")
        text = json.dumps({"machine": machine, "GLIBC_TUNABLES": tunables, **result}, indent=2)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
