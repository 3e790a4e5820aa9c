"""What bounds `native` inference: the time of its parts, by leaving them out of the model one after the other.

    python benchmarks/native_parts.py [--model convmixer_256_8] [--image-size 32] [--batch-size 64] [--json FILE]

A model with ReLU instead of GELU, one that also has 1x1 instead of its depthwise kernels, and plain matrix
multiplications of the size of all its 1x1 convolutions take turns with the model itself, all with random weights. The
medians of the differences within the rounds are the parts. "1x1 convolutions" includes reading, writing and everything
else that is left.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import harness
import torch

import convmixer
from convmixer.registry import get_variant


def parts(name: str, size: int, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return the microseconds per image of each part."""
    variant, _ = get_variant(name)
    x = torch.randn(batch, 3, size, size)

    def native(act: str, kernel_size: int) -> Callable[[], Any]:
        model = convmixer.ConvMixer(
            variant.dim, variant.depth, kernel_size, variant.patch_size, act_layer=act, num_classes=variant.num_classes
        ).eval()
        calibration = x[:64] if dtype == torch.int8 else None
        fast = convmixer.optimize(model, backend="native", dtype=dtype, calibration=calibration)
        return lambda: fast(x)

    positions = (size // variant.patch_size) ** 2
    a = (9 * torch.randn(batch * positions, variant.dim)).to(dtype)
    b = (9 * torch.randn(variant.depth, variant.dim, variant.dim)).to(dtype)
    integers = dtype == torch.int8
    out = torch.empty(len(a), variant.dim, dtype=torch.int32 if integers else dtype)
    multiply: Any = torch._int_mm if integers else torch.mm
    calls = {
        "all": native(variant.act_layer, variant.kernel_size),
        "relu": native("relu", variant.kernel_size),
        "1x1": native("relu", 1),
        "product": lambda: [multiply(a, weight, out=out) for weight in b],
    }
    taken = harness.take_turns(calls, rounds, clock=partial(harness.seconds, least=0.2))
    rows = [dict(zip(taken, row, strict=True)) for row in zip(*taken.values(), strict=True)]

    def median(times: Iterator[float]) -> float:
        return 1e6 / batch * statistics.median(times)

    return {
        "whole model": median(r["all"] for r in rows),
        "activations, beyond ReLU": median(r["all"] - r["relu"] for r in rows),
        "depthwise convolutions, beyond 1x1": median(r["relu"] - r["1x1"] for r in rows),
        "1x1 convolutions, and the rest": median(r["1x1"] for r in rows),
        "matrix products of that size alone": median(r["product"] for r in rows),
    }


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", default="convmixer_256_8")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "model": options.model,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "microseconds_per_image": {},
    }
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            found = parts(options.model, options.image_size, options.batch_size, dtype, options.rounds)
            kind = str(dtype).removeprefix("torch.")
            report["microseconds_per_image"][kind] = found
            print(kind)
            for name, value in found.items():
                print(f"  {name:36} {value:8.1f} us an image, {100 * value / found['whole model']:4.0f} %")
    harness.write(options.json, report)


if __name__ == "__main__":
    main()
