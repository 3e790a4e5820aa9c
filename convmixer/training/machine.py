"""What a run computes with: a device, a precision, processes, and the options for speed."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import timm
import torch

from convmixer.errors import ArgumentError, ConvMixerError, optional
from convmixer.factory import resolve_device
from convmixer.hardware import cpu_name
from convmixer.native import training as native
from convmixer.training.checks import check_batch_size, check_compiler, check_fused, check_graph, check_sync_batchnorm
from convmixer.training.precision import PRECISIONS, choose_precision
from convmixer.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run computes with.

    Attributes:
        device: Where this process computes.
        precision: "float32", "bfloat16" or "float16".
        accelerator: The processes of the run.
        compile: Whether `torch.compile` compiles the model.
        fused: Whether blocks are fused: True, False, or "auto" if native kernels can compute them.
        fused_obstacle: Why "auto" was not possible, or "".
        graph: Whether steps are to be CUDA graphs: True, False or "auto".
        graph_obstacle: Why they cannot be, or "".
    """

    device: torch.device
    precision: str
    accelerator: Accelerator
    compile: bool
    fused: bool | Literal["auto"]
    fused_obstacle: str
    graph: bool | Literal["auto"]
    graph_obstacle: str

    @property
    def processes(self) -> int:
        """How many train together."""
        return int(self.accelerator.num_processes)

    @property
    def uses_graphs(self) -> bool:
        """Whether steps are captured as CUDA graphs."""
        return bool(self.graph) and not self.graph_obstacle

    def describe(self) -> dict[str, Any]:
        """Return the command, the hardware and the versions, for the record of a run."""
        is_ours = Path(sys.argv[0]).name in ("convmixer", "__main__.py")
        processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
        return {
            "command": shlex.join(["convmixer", *sys.argv[1:]]) if is_ours else None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        }


def prepare_machine(
    recipe: Recipe,
    device: str | torch.device,
    *,
    precision: str,
    compile: bool,
    fused: bool | Literal["auto"],
    graph: bool | Literal["auto"],
    trackers: Sequence[str],
    folder: Path,
) -> Machine:
    """Resolve what `train` was asked for, and start the processes.

    Raises:
        ArgumentError: The recipe and the machine do not go together.
        DependencyError: An optional library, or a compiler, is missing.
    """
    target = resolve_device(device)
    if compile:
        check_compiler(target)
    fused, fused_obstacle = choose_fused(recipe, target, fused=fused, compile=compile)
    check_sync_batchnorm(recipe, target, fused=fused is True)
    precision = choose_precision(target, precision)
    accelerator = create_accelerator(target, trackers, folder, PRECISIONS[precision])
    if accelerator.num_processes > 1:
        target = accelerator.device
    check_batch_size(recipe, accelerator.num_processes)
    obstacle = check_graph(graph, recipe, target, precision, accelerator.num_processes)
    return Machine(target, precision, accelerator, compile, fused, fused_obstacle, graph, obstacle)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give back to the caller, at the end of the block, the global random numbers and the state of accelerate.

    Raises:
        ArgumentError: The caller's autocast, or its mode without gradients, would reach into the training.
    """
    contexts = {
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad": not torch.is_grad_enabled(),
        "torch.autocast": any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu"))),
    }
    for name, entered in contexts.items():
        if entered:
            raise ArgumentError(f"train was called within {name}, in which a model does not learn: leave it first")
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = sys.modules.get("accelerate.state")
    kinds = [state.PartialState, state.AcceleratorState, state.GradientState] if state else []
    shared = [dict(kind._shared_state) for kind in kinds]
    try:
        yield
    finally:
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        np.random.set_state(numbers[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        for kind, values in zip(kinds, shared, strict=True):
            if values:  # a loop of the caller's own goes on with its precision and its device
                kind._shared_state.clear()
                kind._shared_state.update(values)


def choose_fused(
    recipe: Recipe, device: torch.device, *, fused: bool | Literal["auto"], compile: bool
) -> tuple[bool | Literal["auto"], str]:
    """Return whether blocks are fused, and why "auto" became False: no other place decides it.

    "auto" stays on a CPU if native kernels can train the recipe. The model then decides by its own layers.

    Raises:
        ArgumentError: Fused blocks were asked for, and lack what the recipe needs.
        DependencyError: They cannot be compiled here.
    """
    if not (isinstance(fused, bool) or fused == "auto"):
        raise ArgumentError(f"fused={fused!r}; valid: True, False, 'auto'")
    if fused is False:
        return False, ""
    if fused == "auto" and device.type != "cpu":
        return False, f"the model is on {device.type!r}, and only --fused fuses it there"
    try:
        check_fused(recipe, compile=compile)
    except ConvMixerError as error:
        if fused == "auto":
            return False, str(error)
        raise
    obstacle = native.lacking() if fused == "auto" else None
    return (False, obstacle) if obstacle else (fused, "")


def create_accelerator(
    device: torch.device, trackers: Sequence[str], folder: Path, mixed_precision: str
) -> Accelerator:
    """Return the processes of this run, as accelerate has them.

    Args:
        device: Where to compute; with several processes accelerate gives each its own.
        trackers: Names of trackers, which write into `folder`.
        mixed_precision: A value of `PRECISIONS`.

    Raises:
        ArgumentError: An unknown tracker, or one whose package is missing.
        DependencyError: A library for training is missing.
    """
    if isinstance(trackers, str):
        raise ArgumentError(f"trackers={trackers!r}: give a list of names")
    optional("matplotlib.figure", "training", "train")  # for the curves, after an epoch's work
    accelerate = optional("accelerate", "training", "train")
    # accelerate remembers an earlier run in this process, which may have used another device.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()  # it may say that steps are still being accumulated
    try:
        accelerator: Accelerator = accelerate.Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=mixed_precision,
            log_with=list(trackers) or None,
            project_dir=str(folder),
        )
    except ValueError as error:
        raise ArgumentError(f"trackers={list(trackers)!r}, mixed_precision={mixed_precision!r}: {error}") from error
    accelerator.gradient_accumulation_steps = 1  # the recipe says it; accelerate takes it from the environment
    missing = set(trackers) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing:
        raise ArgumentError(f"trackers={list(trackers)!r}: install {', '.join(sorted(missing))} first")
    return accelerator
