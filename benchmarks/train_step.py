"""A training step, by default of convmixer_256_8: images per second and activation memory, against timm's model.

    python benchmarks/train_step.py [--model NAME] [--device cpu] [--batch-size 64] [--precision bfloat16] [--rounds 9]
                                    [--only WORD ...] [--cpu-time] [--json FILE]
    python benchmarks/train_step.py --dry-run

The same weights in timm's class and in ours (eager, and compiled as `convmixer train --compile` runs it; with and
without fused blocks, these on a CPU by PyTorch and by native kernels), by AdamW. `--only` takes the ways whose names
contain one of the words. All ways take turns in one process, each with an untimed step before the timed one: others
may have freed its memory. Ratios are medians over rounds, against timm's best. Memory is what autograd keeps between
forward and backward, and its ratio is against timm's eager step. The share of the ceiling compares the arithmetic of a
step with PyTorch's multiplication of two large matrices in the same precision, timed in the same rounds. On Linux with
glibc, GLIBC_TUNABLES as in docs/training_speed.md helps all of them.

On a CUDA device ours run as CUDA graphs, too, as `convmixer train` runs them there, with AdamW and with Muon. A dry run
makes two steps of a tiny model on four images, on a CPU with calls in place of graphs: it shows that all of it runs.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer as TimmConvMixer

import convmixer
from convmixer.native.training import set_native_training
from convmixer.runtime.cuda_graphs import WARM_UP, CudaGraphs, Graphed
from convmixer.training import Recipe
from convmixer.training.optimizers import create_optimizer
from convmixer.training.precision import autocast

PLAIN, LAST = torch.contiguous_format, torch.channels_last
CEILING, MATRIX_SIDE = "matrix multiplication", 2048


class Way:
    """A model, its forward pass, and a step of training with it."""

    def __init__(
        self,
        model: torch.nn.Module,
        layout: torch.memory_format,
        compile: bool,
        precision: str,
        opt: str = "adamw",
        graph: bool = False,
        native: bool = True,
    ) -> None:
        self.native = native  # fused blocks on a CPU
        self.model = model.to(memory_format=layout)
        self.forward: Callable = torch.compile(self.model, dynamic=False) if compile else self.model
        self.layout, self.precision = layout, precision
        self.device = next(model.parameters()).device
        if isinstance(model, convmixer.ConvMixer):
            self.optimizer = create_optimizer(Recipe(opt=opt, lr=1e-3), model, self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(1e-3, device=self.device)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        graphs = CudaGraphs(self.device) if graph and self.device.type == "cuda" else None
        self.run = Graphed(self.compute, graphs, self.failed)

    def failed(self, error: RuntimeError) -> None:
        raise error

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        set_native_training(self.native)
        with autocast(self.device, self.precision):
            logits = self.forward(images.contiguous(memory_format=self.layout))
        return F.cross_entropy(logits.float(), labels)

    def compute(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.loss(images, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor, clock: Callable[[], float]) -> float:
        """Return the seconds of a step, after an untimed one."""
        for _ in range(2):
            start = clock()
            self.run(images, labels)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = clock() - start
        return seconds

    def kept(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Return the bytes that autograd keeps for the backward pass, without parameters."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(images, labels)
        loss.backward()  # until here all of them were alive, so no address was used twice
        self.optimizer.zero_grad(set_to_none=True)
        return sum(storages.values())


def parse() -> argparse.Namespace:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", default="convmixer_256_8", help="a variant; images of its size")
    parser.add_argument("--only", nargs="+", default=[""], help="the ways whose names contain one of these words")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, in processor time: for a busy machine")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.batch_size, arguments.rounds = 4, 1
    return arguments


def make_ways(arguments: argparse.Namespace, model: convmixer.ConvMixer) -> dict[str, Way]:
    """Return the ways whose names were asked for, with equal weights in the shape of a model."""
    kernel_size = model.blocks[0][0].fn[0].kernel_size[0]
    shape = {"dim": model.dim, "depth": len(model.blocks), "kernel_size": kernel_size, "patch_size": model.patch_size}
    shape |= {"num_classes": 10, **({"dim": 16, "depth": 1} if arguments.dry_run else {})}
    state = convmixer.ConvMixer(**shape).state_dict()

    def way(ours: bool, layout: torch.memory_format, compile: bool, fused: bool = False, **options: Any) -> Way:
        build = convmixer.ConvMixer if ours else TimmConvMixer
        model = build(**shape)
        model.load_state_dict(state)
        model.to(arguments.device)
        if fused:
            model.set_fused()
        return Way(model, layout, compile, arguments.precision, **options)

    kinds: dict[str, dict[str, bool]] = {
        "convmixer eager": {"compile": False},
        "convmixer compiled": {"compile": True},
        "convmixer fused": {"compile": False, "fused": True, "native": False},
        "convmixer fused, compiled": {"compile": True, "fused": True, "native": False},
    }
    if arguments.device.type == "cpu":
        kinds["convmixer native"] = {"compile": False, "fused": True}
    makers: dict[str, Callable[[], Way]] = {
        "timm eager NCHW": functools.partial(way, False, PLAIN, False),
        "timm eager channels_last": functools.partial(way, False, LAST, False),
        "timm compiled NCHW": functools.partial(way, False, PLAIN, True),
        "timm compiled channels_last": functools.partial(way, False, LAST, True),
        **{name: functools.partial(way, True, LAST, **options) for name, options in kinds.items()},
    }
    if arguments.device.type == "cuda" or arguments.dry_run:
        for name, options in kinds.items():
            for opt in ("adamw", "muon"):
                makers[f"{name}, {opt}, graph"] = functools.partial(way, True, LAST, graph=True, opt=opt, **options)
    return {name: make() for name, make in makers.items() if any(word in name for word in arguments.only)}


def operations(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Count the floating point operations of a step: of the forward pass, and of gradients of inputs and weights.

    Works for timm's class and ours. The images themselves get no gradient.
    """
    stem, *others = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    height, width = (side // stem.stride[0] for side in images.shape[2:])
    per_position = 2 * stem.weight.numel() + 3 * sum(convolution.weight.numel() for convolution in others)
    return 2 * len(images) * (height * width * per_position + 3 * model.head.weight.numel())


def matrix_multiplication(arguments: argparse.Namespace, clock: Callable[[], float]) -> Callable[[], float]:
    """Return a call that returns the seconds of one large matrix multiplication."""
    side = 64 if arguments.dry_run else MATRIX_SIDE
    a = torch.randn(side, side, device=arguments.device, dtype=getattr(torch, arguments.precision))
    out = torch.empty_like(a)

    def call() -> float:
        start = clock()
        torch.mm(a, a, out=out)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        return clock() - start

    return call


def time_steps(
    ways: dict[str, Way], images: torch.Tensor, labels: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Return the seconds of each way's steps, and of a matrix multiplication; they take turns."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    calls = {name: functools.partial(it.step, images, labels, clock) for name, it in ways.items()}
    calls[CEILING] = matrix_multiplication(arguments, clock)
    untimed = 1 if arguments.dry_run else WARM_UP + 1  # they compile, warm up and capture
    return harness.take_turns(calls, arguments.rounds, warm_up=untimed, clock=lambda step: step())


def compare(
    seconds: dict[str, list[float]], memory: dict[str, float], work: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Print each way next to timm's best, and return the figures.

    Args:
        seconds: From `time_steps`.
        memory: MiB per image that each way keeps.
        work: Floating point operations of a step.
        arguments: Of the command line.
    """
    multiplications = seconds.pop(CEILING)
    side = 64 if arguments.dry_run else MATRIX_SIDE
    shares = {name: harness.ratio(multiplications, times) * work / (2 * side**3) for name, times in seconds.items()}
    rates = {name: arguments.batch_size / statistics.median(times) for name, times in seconds.items()}
    best = max((name for name in rates if name.startswith("timm")), key=rates.__getitem__, default=next(iter(rates)))
    ratios = {name: harness.ratio(seconds[best], times) for name, times in seconds.items()}
    least = min((memory[name] for name in memory if name.startswith("timm eager")), default=memory[best])
    for name in rates:
        print(
            f"{name:40} {rates[name]:6.1f} images/s, {ratios[name]:.2f} of {best}; "
            f"{memory[name]:6.2f} MiB/image, {memory[name] / least:.2f} of timm eager; "
            f"{100 * shares[name]:.0f} % of ceiling"
        )
    return {
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "images_per_second": rates,
        "activation_mib_per_image": memory,
        "best_of_timm": best,
        "ratios": ratios,
        "shares_of_ceiling": shares,
        "ceiling_gflops": 2 * side**3 / statistics.median(multiplications) / 1e9,
        "model": arguments.model,
        "cpu_time_of_one_thread": arguments.cpu_time,
        "ratio": max(ratios.values()),
    }


def main() -> None:
    arguments = parse()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = convmixer.create_model(arguments.model, device="cpu", num_classes=10)
    images = torch.randn(arguments.batch_size, *model.pretrained_cfg["input_size"], device=arguments.device)
    labels = torch.randint(10, (arguments.batch_size,), device=arguments.device)
    ways = make_ways(arguments, model)
    seconds = time_steps(ways, images, labels, arguments)
    memory = {name: it.kept(images, labels) / arguments.batch_size / 2**20 for name, it in ways.items()}
    work = operations(next(iter(ways.values())).model, images)
    result = compare(seconds, memory, work, arguments)
    harness.write(arguments.json, result, arguments.device)


if __name__ == "__main__":
    main()
