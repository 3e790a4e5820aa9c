"""Time to create a model and load its weights from disk: this package, timm, and construction alone.

    python benchmarks/load.py [--repeats 15] [--json FILE]

Random weights of each variant are written to a temporary file first; what is timed is the same for them. The ways take
turns in one process, and medians are compared, because machines are noisy. The file is in the page cache.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import convmixer

VARIANTS = ("convmixer_256_8", "convmixer_768_32", "convmixer_1536_20")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    results = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            state = convmixer.create_model(name, device="cpu", channels_last=False).state_dict()
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
            overlay = {"file": str(file)}
            ways = {
                "convmixer": lambda name=name, file=file: convmixer.create_model(name, checkpoint=file, device="cpu"),
                "timm": lambda name=name, overlay=overlay: timm.create_model(
                    name, pretrained=True, pretrained_cfg_overlay=overlay
                ),
                "without weights": lambda name=name: convmixer.create_model(name, device="meta"),
            }
            seconds = {way: [] for way in ways}
            for repeat in range(arguments.repeats + 2):
                for way, create in ways.items():
                    start = time.perf_counter()
                    create()
                    if repeat >= 2:  # the first two rounds warm up
                        seconds[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratio = statistics.median(t / c for t, c in zip(seconds["timm"], seconds["convmixer"], strict=True))
        results[name] = {"median_seconds": medians, "timm_to_convmixer": ratio}
        shown = "  ".join(f"{way} {1000 * median:.1f} ms" for way, median in medians.items())
        print(f"{name:20} {shown}  timm / convmixer {ratio:.2f}")
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        machine |= {"timm": timm.__version__, "threads": torch.get_num_threads(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
