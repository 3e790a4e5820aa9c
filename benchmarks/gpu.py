"""Kernels and whole models on a GPU, in about ten minutes: ours against cuDNN, against timm and against the roof.

    python benchmarks/gpu.py --json FILE [--minutes 10]
    python benchmarks/gpu.py --dry-run

Kernels: each operation of a block in bfloat16, 64 images, by our kernels in both forms and by PyTorch (cuDNN) in both
layouts, with the time at an H200's roof. Models: images per second and peak memory of inference and of a training step
(AdamW) in bfloat16 with random weights; timm's class in both layouts, and compiled with and without TorchInductor's
layout optimisation; ours folded in each backend, and for training fused, where the model can be. Largest batch: of a
training step, in powers of two. What the minutes do not reach is listed as left out; the file is written after each
step. A dry run computes tiny shapes anywhere, in Triton's interpreter: it shows that all of it runs.
"""

# ruff: noqa: E402
import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import timm
import torch
import torch.nn.functional as F
import triton
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

import convmixer
from convmixer.ops import triton as ops

DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float16 if DRY else torch.bfloat16  # the interpreter has no products of bfloat16
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# dim, depth, kernel, patch, activation, image side, classes, images of a training step
MODELS: dict[str, tuple[int, int, int, int, type[nn.Module], int, int, int]] = {
    "convmixer_1536_20": (1536, 20, 9, 7, nn.GELU, 224, 1000, 64),
    "convmixer_768_32": (768, 32, 7, 7, nn.ReLU, 224, 1000, 128),
    "convmixer_1024_20_ks9_p14": (1024, 20, 9, 14, nn.GELU, 224, 1000, 256),
    "convmixer_256_8": (256, 8, 5, 2, nn.GELU, 32, 10, 1024),
}
if DRY:
    MODELS = {"tiny": (8, 2, 3, 2, nn.GELU, 8, 3, 2)}
# H200: dense products in bfloat16, the float32 cores, memory.
PRODUCTS, CORES, MEMORY = 790e12, 67e12, 4.3e12


def seconds(call: Callable[[], Any], least: float) -> float:
    """Median time of a call after three untimed ones."""
    if DRY:
        call()
        return float("nan")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    while sum(times) < least or len(times) < 5:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return float("nan") if DRY else torch.cuda.max_memory_allocated() / 2**20


class Report:
    """What was measured; written after each step, which is left out when time is up and named when it fails."""

    def __init__(self, file: Path | None, minutes: float) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        device = "cpu, dry run" if DRY else torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__}
        self.content: dict[str, Any] = {"device": device, "dtype": str(DTYPE), **versions, "left_out": [], "failed": {}}

    def step(self, section: str, name: str, measure: Callable[[], Any]) -> None:
        if time.monotonic() > self.end:
            self.content["left_out"].append(f"{section}: {name}")
        else:
            free()
            try:
                found = measure()
            except Exception as error:
                if DRY:
                    raise
                self.content["failed"][f"{section}: {name}"] = f"{type(error).__name__}: {error}"[:300]
            else:
                self.content.setdefault(section, {})[name] = found
                print(f"{section}: {name}: {found}", flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps(self.content, indent=1) + "\n")


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernel_steps(report: Report, variant: str) -> None:
    dim, _, size, patch, _, side, _, _ = MODELS[variant]
    batch, side = 2 if DRY else 64, side // patch
    before, after = (size - 1) // 2, size // 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    plain, weight, square = draw(batch, dim, side, side), draw(dim, 1, size, size) / size, draw(dim, dim) / dim**0.5
    x, vector = plain.contiguous(memory_format=torch.channels_last), torch.rand(dim, device=DEVICE)
    tensor, values = x.nbytes, x.numel()
    taps, products = 2 * size * size * values / CORES, 2 * dim * values / PRODUCTS

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        if before != after:
            x = F.pad(x, (before, after, before, after))
        return F.conv2d(x, weight, padding=before if before == after else 0, groups=dim)

    def backward(x: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            x, x, weight, None, [1, 1], [before, before], [1, 1], False, [0, 0], dim, mask
        )

    ways: dict[str, tuple[float, Callable[[], Any]]] = {}
    for config in ops.forms(x, size):
        form = type(config).__name__.lower()
        ours = functools.partial(ops._convolve, x, weight, config=config)
        ways[f"depthwise + sums, {form}"] = (
            max(2 * tensor / MEMORY, taps),
            functools.partial(ours, bias=vector, act="gelu", center=vector),
        )
        ways[f"depthwise_infer, {form}"] = (
            max(2 * tensor / MEMORY, taps),
            functools.partial(ours, bias=vector, act="gelu", scale=vector, residual=x),
        )
        ways[f"depthwise_input_grad, {form}"] = (
            max(3 * tensor / MEMORY, taps),
            functools.partial(ours, bias=None, act="identity", residual=x, transpose=True),
        )
    for config in ops.gradients(x, size):
        form = "direct" if isinstance(config, ops.Gradient) else "banded"
        ways[f"depthwise_weight_grad, {form}"] = (
            max(2 * tensor / MEMORY, taps),
            functools.partial(ops._correlate, x, x, size, config),
        )
    for row in (1, 2):
        config = ops._row(ops.POINTWISE, x, row)
        ways[f"pointwise + sums, z {'in a pass before' if config.apart else 'on the way'}"] = (
            max(3 * tensor / MEMORY, products),
            functools.partial(ops._multiply, x, square, vector, "gelu", (vector, vector, x), vector, config=config),
        )
    ways |= {
        "pointwise_infer": (
            max(2 * tensor / MEMORY, products),
            lambda: ops.pointwise_infer(x, square, vector, "gelu", vector, vector),
        ),
        "sum_normalized": (
            3 * tensor / MEMORY,
            lambda: ops.sum_normalized(x, vector, vector, "gelu", x, vector, vector, "gelu"),
        ),
        "normalize_act": (2 * tensor / MEMORY, lambda: ops.normalize_act(x, vector, vector, "gelu")),
        "normalize_act_grad": (3 * tensor / MEMORY, lambda: ops.normalize_act_grad(x, x, vector, "gelu")),
        "stats_grad": (3 * tensor / MEMORY, lambda: ops.stats_grad(x, x, "gelu", vector, vector, vector)),
    }
    for name, image in {"NCHW": plain, "channels_last": x}.items():
        ways[f"PyTorch {name}: depthwise"] = 0.0, functools.partial(convolve, image, weight)
        ways[f"PyTorch {name}: pointwise"] = 0.0, functools.partial(F.conv2d, image, square[:, :, None, None])
        if before == after:
            input_grad = functools.partial(backward, image, [True, False, False])
            ways[f"PyTorch {name}: depthwise input gradient"] = 0.0, input_grad
            weight_grad = functools.partial(backward, image, [False, True, False])
            ways[f"PyTorch {name}: depthwise weight gradient"] = 0.0, weight_grad
    for name, (roof, call) in ways.items():
        report.step(
            f"kernels of {variant}, microseconds",
            name,
            lambda call=call, roof=roof: (
                {"measured": 1e6 * seconds(call, 0.05)} | ({"h200_roof": 1e6 * roof} if roof else {})
            ),
        )


# ---- models ---------------------------------------------------------------------------------------------------------


def build(variant: str, ours: bool) -> nn.Module:
    dim, depth, size, patch, act, _, classes, _ = MODELS[variant]
    options: dict[str, Any] = {"kernel_size": size, "patch_size": patch, "num_classes": classes, "act_layer": act}
    return (convmixer.ConvMixer if ours else TimmConvMixer)(dim=dim, depth=depth, **options).to(DEVICE)


def images(variant: str, batch: int, layout: torch.memory_format) -> Tensor:
    side = MODELS[variant][5]
    return torch.randn(batch, 3, side, side, device=DEVICE).contiguous(memory_format=layout)


def compiled(model: nn.Module, moves: bool) -> nn.Module:
    """Compiled with or without TorchInductor's layout optimisation."""
    if DRY:
        return torch.compile(model, backend="aot_eager")
    return torch.compile(model, options={"layout_optimization": moves}, dynamic=False)


def infer(variant: str, model: Callable[[Tensor], Any], layout: torch.memory_format) -> dict[str, float]:
    batch = 2 * MODELS[variant][-1]
    x = images(variant, batch, layout).to(DTYPE)
    with torch.no_grad():
        return {"images_per_second": batch / seconds(lambda: model(x), 1.0), "batch": batch, "peak_mib": peak()}


def trainer(variant: str, model: nn.Module, layout: torch.memory_format, batch: int) -> Callable[[], None]:
    x = images(variant, batch, layout)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, DTYPE):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def train(variant: str, model: nn.Module, layout: torch.memory_format) -> dict[str, float]:
    batch = MODELS[variant][-1]
    step = trainer(variant, model, layout, batch)
    return {"images_per_second": batch / seconds(step, 1.0), "batch": batch, "peak_mib": peak()}


def largest(variant: str, make: Callable[[], nn.Module]) -> int:
    """The largest power of two of images in a training step that the memory holds."""
    batch = 0
    for power in range(2 if DRY else 16):
        try:
            trainer(variant, make(), torch.channels_last, 2**power)()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            free()
        batch = 2**power
    return batch


def fused(variant: str) -> nn.Module:
    model = build(variant, True).to(memory_format=torch.channels_last)
    model.set_fused(True)
    return model


def model_steps(report: Report, variant: str) -> None:
    section = f"inference of {variant}"
    for name, layout in LAYOUTS.items():
        model = build(variant, False).to(DTYPE, memory_format=layout).eval()
        report.step(section, f"timm {name}", functools.partial(infer, variant, model, layout))
    for moves in (True, False):
        what = f"timm compiled, layout optimisation {'on' if moves else 'off'}"
        model = build(variant, False).to(DTYPE).eval()
        report.step(section, what, lambda m=model, o=moves: infer(variant, compiled(m, o), torch.contiguous_format))
    for backend in ("triton", "eager") if DRY else ("triton", "eager", "compile"):
        report.step(
            section,
            f"ours, {backend}",
            lambda b=backend: infer(
                variant,
                convmixer.optimize(build(variant, True).eval(), backend=b, dtype=DTYPE),
                torch.channels_last,
            ),
        )
    section = f"training of {variant}"
    for name, layout in LAYOUTS.items():
        model = build(variant, False).to(memory_format=layout)
        report.step(section, f"timm {name}", functools.partial(train, variant, model, layout))
    if hasattr(convmixer.ConvMixer, "set_fused"):
        report.step(section, "ours, fused", lambda: train(variant, fused(variant), torch.channels_last))
        report.step(
            section,
            "ours, fused, compiled",
            lambda: train(variant, compiled(fused(variant), True), torch.channels_last),
        )
    for moves in (True, False):
        what = f"timm compiled, layout optimisation {'on' if moves else 'off'}"
        model = build(variant, False)
        report.step(section, what, lambda m=model, o=moves: train(variant, compiled(m, o), torch.contiguous_format))
    section = f"largest batch of {variant}"
    report.step(section, "timm channels_last", lambda: largest(variant, lambda: build(variant, False)))
    if hasattr(convmixer.ConvMixer, "set_fused"):
        report.step(section, "ours, fused", lambda: largest(variant, lambda: fused(variant)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, anywhere")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: --dry-run computes tiny shapes without one")
    report = Report(arguments.json, arguments.minutes)
    for variant in MODELS:  # the most important ones first
        kernel_steps(report, variant)
        model_steps(report, variant)
    print(f"left out: {report.content['left_out']}; failed: {report.content['failed']}")


if __name__ == "__main__":
    main()
