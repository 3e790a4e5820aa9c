"""Time and memory of predict_dataset, against decoding and inference without it.

    python benchmarks/batch.py --data FOLDER_OR_TAR [--images 100000] [--model NAME] [--rounds 3] [--json FILE]

The files of the images are repeated, as entries of a new tar, until there are so many: CIFAR-10's 50,000 training
images give 100,000. In each round take turns:

- decoding: every image is read from the tar and prepared, in this process
- inference: the optimized model computes as many prepared images, in the same batches
- predict_dataset: all of its work, with its workers and the files that it writes

The ratio is the time of the last one to the sum of the first two, and should be at most 1.15. Memory is the
proportional set size (PSS) of this process and its workers, sampled while predict_dataset runs. The largest values in
each quarter of the time show whether it grows.
"""

import io
import itertools
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import psutil
import torch

import convmixer
from convmixer.data.parts import Parts, open_parts
from convmixer.inference import compute, preparation

BATCH = 64


def repeat(source: str, count: int, target: Path) -> None:
    """Write a tar of `count` images, those of the source over and over."""
    parts = open_parts(source, rows=1)
    with tarfile.open(target, "w") as archive:
        for number in range(count):
            file = parts.images.images[number % len(parts)]  # type: ignore[attr-defined]
            with open(file.path, "rb") as opened:
                opened.seek(file.start)
                content = opened.read(-1 if file.size is None else file.size)
            member = tarfile.TarInfo(f"{number:07}{Path(file.name).suffix}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def memory_mib() -> float:
    """Return the memory of this process and its workers."""
    total, me = 0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


class Watch(threading.Thread):
    """Samples memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            self.samples.append(memory_mib())

    def stop(self) -> dict[str, float]:
        self.over.set()
        self.join()
        quarters = [self.samples[len(self.samples) * i // 4 : len(self.samples) * (i + 1) // 4] for i in range(4)]
        return {f"quarter {i + 1}": round(max(quarter, default=0.0), 1) for i, quarter in enumerate(quarters)}


def decode(parts: Parts, prepare: Callable[[Any], torch.Tensor]) -> None:
    """Read and prepare all images, as many at a time as a batch has."""
    items = (item for part in range(len(parts)) for _, item in parts.read(part))
    while batch := [parts.decode(item, prepare) for item in itertools.islice(items, BATCH)]:
        torch.stack(batch)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--model", default="convmixer_256_8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    model = convmixer.create_model(arguments.model, pretrained=True)
    prepare = preparation(model)
    fast = convmixer.optimize(model, backend="auto")
    memory: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        tar, outputs = Path(temporary, "images.tar"), itertools.count()
        repeat(arguments.data, arguments.images, tar)
        parts = open_parts(tar, rows=10_000)
        some = torch.stack([parts.decode(i, prepare) for i in range(min(BATCH, arguments.images))])

        def infer() -> None:
            for start in range(0, arguments.images, BATCH):
                compute(fast, some[: arguments.images - start]).softmax(1).topk(5)[1].tolist()

        def predict() -> None:
            watch = Watch()
            watch.start()
            output = Path(temporary, f"out-{next(outputs)}")
            options = {"batch_size": BATCH, "workers": arguments.workers, "report": lambda _: None}
            summary = convmixer.predict_dataset(model, tar, output, **options)
            memory.append(watch.stop())
            assert (summary.images, summary.errors) == (arguments.images, 0)

        calls = {"decoding": lambda: decode(parts, prepare), "inference": infer, "predict_dataset": predict}
        seconds = harness.take_turns(calls, arguments.rounds, warm_up=0)
    bare = [a + b for a, b in zip(seconds["decoding"], seconds["inference"], strict=True)]
    ratio = harness.ratio(seconds["predict_dataset"], bare)
    for name, times in {**seconds, "decoding + inference": bare}.items():
        median = statistics.median(times)
        print(f"{name:20} {median:8.1f} s  {arguments.images / median:8,.0f} images/s")
    print(f"predict_dataset / (decoding + inference) {ratio:.2f}; memory in MiB {memory[-1]}; {fast.choice}")
    record = {
        "images": arguments.images,
        "model": arguments.model,
        "seconds": seconds,
        "ratio": ratio,
        "memory_mib": memory,
        "choice": str(fast.choice),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    harness.write(arguments.json, record)


if __name__ == "__main__":
    main()
