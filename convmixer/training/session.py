"""The training loop: one numeric path for every device, a checkpoint after every epoch, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch

from convmixer.data.memory import (
    Source,
    shorten,
)
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, TrainingStopped, optional
from convmixer.factory import resolve_device
from convmixer.hardware import cpu_name
from convmixer.hub.checkpoints import read_tensors, save_weights
from convmixer.model import ConvMixer
from convmixer.native import library as native
from convmixer.ops.fused import cannot_compile
from convmixer.plots import plot_history, write_figure
from convmixer.runtime.cuda_graphs import CudaGraphs
from convmixer.training.checks import check_together, why_no_graph
from convmixer.training.history import Epoch, write_history
from convmixer.training.precision import PRECISIONS, choose_precision, flush_denormals
from convmixer.training.recipes import Recipe
from convmixer.training.run import Run
from convmixer.training.signals import StoppedWhileCompilingError, stop_signals
from convmixer.training.splits import read_splits, source_name
from convmixer.training.trainer import ADVICE, PartialEpoch, Trainer
from convmixer.training.validation import Progress, evaluate, no_progress

if TYPE_CHECKING:
    from accelerate import Accelerator

DRAW_EVERY = 10  # seconds between drawings of the curves, which take half a second


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves: the trained model, its history, and top-1 in percent per test set."""

    model: ConvMixer
    history: list[Epoch]
    test_accuracy: dict[str, float]
    weights: Path


def _best(recipe: Recipe, history: Sequence[Epoch]) -> int:
    """Number of the epoch with the lowest validation loss, later ones lower by more than `min_delta`; 0 is none."""
    best, lowest = 0, math.inf
    for row in history:
        if row.validation_loss < lowest - recipe.min_delta:
            best, lowest = row.epoch, row.validation_loss
    return best


def train(
    recipe: Recipe,
    data: str | Path,
    output: str | Path,
    *,
    val: str | Path | None = None,
    tests: Sequence[str | Path] = (),
    labels: str | Path | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    workers: int | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compile: bool = False,
    fused: bool = False,
    graph: bool | Literal["auto"] = "auto",
    trackers: Sequence[str] = (),
    progress: Progress = no_progress,
    report: Callable[[str], None] = print,
) -> TrainingResult:
    """Train a model, validate after every epoch, test at the end.

    Under `torchrun` or `accelerate launch` the processes share each step: `recipe.batch_size` counts the images of
    all of them, and BatchNorm sees those of its own process. Two processes compute what one does with
    `accumulate=2`, but for the running statistics of BatchNorm, of which the first process's are kept.

    Args:
        recipe: From `get_recipe`.
        data: Source of the training split, and of the validation and test splits where it has them; see `load_images`.
        output: Folder of the run; `convmixer.training.run` says what it will hold.
        val: Source of the validation split, in place of one in `data` and of images held out.
        tests: Further test sets.
        labels: A table with the columns image and label for the images in `data`, in place of class folders. `val` and
            `tests` may be such tables themselves, with their images beside them.
        data_root: Where downloaded data sets lie: by default `data` for `torch/`, the Hub's cache for `hfds/`.
        download: Let `torch/` data sets download what is missing.
        skip_unreadable: Leave out images that cannot be read, and say which. In a stream, others take their place in
            training.
        workers: Processes that decode a stream, for each process that trains; 0 decodes there. By default one per
            processor core. Only with `recipe.stream`.
        resume: Go on where `output` was left; with the same data and options, exactly as if there had been no
            interruption. Of the recipe only `epochs` may have changed.
        device: "auto" takes the accelerator if there is one.
        precision: "float32", "bfloat16" or "float16" (mixed precision; float16 on a GPU, with scaled gradients), or
            "auto": bfloat16 where the hardware has products for it, else float32.
        compile: Use `torch.compile`; on a CPU it needs a C++ compiler, on a GPU Triton.
        fused: Use fused blocks, which keep less than half of the activations; see `ConvMixer.set_fused`.
        graph: On a CUDA device, capture a step as one CUDA graph and replay it, so that the host need not launch each
            kernel. "auto" does so where it is possible, and reports why where it is not.
        trackers: Names of trackers that accelerate knows, such as "tensorboard"; they write into `output`.
        progress: Called as `progress(iterable, description)`, for a progress bar.
        report: Takes each line of text.

    Raises:
        ArgumentError: A setting that makes no sense, or a run in `output` that may not be continued or replaced.
        DataError: Data that cannot be found or read.
        TrainingStopped: SIGTERM or SIGINT came; what was done is saved, to the step. While `torch.compile` is at work
            training stops at once, and what was saved before is kept.
        DependencyError: An optional library, or the compiler that `compile` needs, is missing.
        ConvMixerError: The loss became infinite or not a number, or the disk is full.
    """
    run = Run(output, recipe, resume=resume)
    where = resolve_device(device)
    if compile and (lacking := native.inductor_lacks(where)):
        raise DependencyError(f"compile {lacking}; or train without compile (--compile)")
    if compile and fused and (lacking := cannot_compile()):
        raise DependencyError(lacking)
    check_together(recipe, data, val, tests, where, workers, fused)
    numbers = choose_precision(where, precision)
    accelerator = _accelerator(where, trackers, run.folder, PRECISIONS[numbers])
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes > 1:
        where = accelerator.device
    first = accelerator.is_main_process
    progress_here = progress if first else no_progress
    parts = recipe.accumulate * accelerator.num_processes
    if recipe.batch_size % parts or ((recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2):
        raise ArgumentError(
            f"batch_size={recipe.batch_size} does not divide into {accelerator.num_processes} processes with "
            f"accumulate={recipe.accumulate} equal parts each, even ones for mixup and cutmix"
        )

    obstacle = why_no_graph(recipe, where, numbers, accelerator.num_processes)
    if not (isinstance(graph, bool) or graph == "auto"):
        raise ArgumentError(f"graph={graph!r}; valid: True, False, 'auto'")
    if graph is True and obstacle:
        raise ArgumentError(f"graph=True: {obstacle}; give 'auto', or False (--no-graph)")

    def say(line: str) -> None:
        if first:
            report(line)
            run.log(line)

    def not_captured(error: RuntimeError) -> None:
        if graph is True:
            raise ConvMixerError(f"graph=True: capturing a step failed: {error}. Give 'auto', or False") from error
        say(f"capturing a step as a CUDA graph failed, so the run goes on without: {error}")

    with flush_denormals(where), run.locked() if first else contextlib.nullcontext():
        started = time.time()
        state = run.load() if resume else None
        with accelerator.main_process_first() if download else contextlib.nullcontext():
            training, validation, test_sets = read_splits(
                recipe,
                data,
                val,
                tests,
                labels,
                data_root,
                download,
                skip_unreadable,
                workers,
                accelerator.num_processes,
                progress_here,
                say,
            )
        if len(training) < recipe.batch_size:
            raise ArgumentError(f"{len(training)} training images do not fill one batch of {recipe.batch_size}")
        if recipe.patience and not len(validation):
            raise ArgumentError(
                f"patience={recipe.patience} needs validation images: validation_fraction={recipe.validation_fraction} "
                f"of {len(training)} images is none"
            )
        held = training.record() | {"validation": len(validation)}
        if state and state["data"].get("streams") != held.get("streams"):
            raise ArgumentError(
                f"cannot resume {str(run.state)!r}: {state['data'].get('streams')} workers of all processes read the "
                f"shards, now {held.get('streams')}, which changes the order of the images"
            )
        if state and {**held, **state["data"]} != held:  # what an older version did not keep is taken to be the same
            had = state["data"]
            raise ArgumentError(
                f"cannot resume {str(run.state)!r} with other data: it had {had['images']} training images of "
                f"{len(had['classes'])} classes, here are {held['images']} of {len(held['classes'])}; validation "
                f"images: {had.get('validation', 'unknown')}, here {held['validation']}"
                + ("; other labels" if had.get("labels") != held.get("labels") else "")
            )
        trainer = Trainer(
            recipe,
            training,
            where,
            accelerator,
            compile=compile,
            fused=fused,
            graphs=CudaGraphs(where) if graph and not obstacle else None,
            not_captured=not_captured,
        )
        steps, history, place = trainer.steps, list[Epoch](), PartialEpoch()
        if state:
            try:
                trainer.load(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ConvMixerError(
                    f"cannot resume from {str(run.state)!r}: {error}. Another version of convmixer may have written "
                    "it: delete it to start anew"
                ) from error
            history = [Epoch(**row) for row in state["history"]]
            place = PartialEpoch(**state["place"])
        if first:
            run.begin()
        if trackers:
            accelerator.init_trackers("convmixer")
        names = {
            "architecture": recipe.model.split(".")[0],
            "label_names": list(training.classes),
            "input_size": list(trainer.model.pretrained_cfg["input_size"]),  # type: ignore[index]
        }
        processes = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
        say(
            f"{recipe.model} on {processes}{where.type}: {len(training)} training, "
            f"{len(validation)} validation images, "
            f"{', '.join(f'{len(s)} test images ({n})' for n, s in test_sets.items()) or 'no test images'}"
        )
        if graph and where.type == "cuda":
            say(f"steps are not CUDA graphs: {obstacle}" if obstacle else "steps are CUDA graphs")
        tell_unreadable = _teller(say)
        drawn = -math.inf
        with _stopping(run) as stopped:
            for epoch in range(len(history), recipe.epochs):
                if recipe.patience and epoch - _best(recipe, history) >= recipe.patience:
                    say(f"no better validation loss in {recipe.patience} epochs: stopped")
                    break
                place, number = trainer.epoch(epoch, place, stopped, progress_here)
                finished = place.step == steps
                tell_unreadable(trainer.images, "others take their place")
                if finished:
                    scores = evaluate(trainer.kept, validation, precision=precision) if first else {}
                    scores = broadcast_object_list([scores])[0]
                    tell_unreadable(validation, "they are left out of validation")
                    if len(validation) and not math.isfinite(scores["loss"]):
                        raise ConvMixerError(
                            f"the validation loss became {scores['loss']} after epoch {epoch + 1}. {ADVICE}"
                        )
                    row = Epoch(
                        epoch=epoch + 1,
                        learning_rate=trainer.rate(epoch, steps - 1),
                        train_loss=place.loss / steps,
                        train_accuracy=100 * place.correct / (steps * recipe.batch_size),
                        validation_loss=scores["loss"],
                        validation_accuracy=scores["top1"],
                        seconds=place.seconds,
                        images_per_second=steps * recipe.batch_size / place.seconds,
                    )
                    history.append(row)
                    place = PartialEpoch()
                if first and finished:
                    _record(run, history, trainer.kept, names)
                    if number or time.monotonic() - drawn > DRAW_EVERY:
                        _draw(run, history)
                        drawn = time.monotonic()
                if first:
                    rows = [dataclasses.asdict(row) for row in history]
                    run.save(**trainer.state(), history=rows, place=dataclasses.asdict(place), data=held)
                if finished:
                    accelerator.log({k: v for k, v in dataclasses.asdict(row).items() if k != "epoch"}, step=row.epoch)
                    say(str(row))
                if number and (not finished or epoch + 1 < recipe.epochs):
                    inside = f"in epoch {epoch + 1} after step {place.step} of {steps}"
                    accelerator.wait_for_everyone()  # the first process is saving
                    raise TrainingStopped(
                        f"stopped {f'after epoch {epoch + 1}' if finished else inside}, and saved: go on with --resume",
                        number,
                    )

        accelerator.wait_for_everyone()  # for the last epoch's files
        if first and history:
            _draw(run, history)
        trainer.close()
        model = trainer.kept
        if recipe.patience and _best(recipe, history):
            model.load_state_dict(read_tensors(run.folder / "best.safetensors"))
            say(f"the weights of epoch {_best(recipe, history)} are the best and are kept")
        weights = run.folder / "model.safetensors"
        accuracy: dict[str, float] = {}
        if first:
            with run.saving(weights.name) as path:
                save_weights(model, path, names)
            scored = {n: evaluate(model, s, progress=progress_here) for n, s in test_sets.items()}
            accuracy = {name: scores["top1"] for name, scores in scored.items()}
            result = {
                **_circumstances(where),
                "recipe": dataclasses.asdict(recipe),
                "data": source_name(data),
                "training_images": len(training),
                "validation_accuracy": history[-1].validation_accuracy if len(validation) else None,
                "test_accuracy": accuracy,
                "test_images": {name: scores["count"] for name, scores in scored.items()},
                "train_seconds": round(sum(row.seconds for row in history)),
                "last_session_seconds": round(time.time() - started),
                "processes": accelerator.num_processes,
            }
            run.write_json("result.json", result)
            for name, top1 in accuracy.items():
                say(f"test {name}: top-1 {top1:.2f} % of {scored[name]['count']} images")
        for name, images in test_sets.items():
            tell_unreadable(images, f"they are left out of the test {name}")
        accuracy = broadcast_object_list([accuracy])[0]
        accelerator.end_training()
    return TrainingResult(model, history, accuracy, weights)


@contextlib.contextmanager
def _stopping(run: Run) -> Iterator[Callable[[], int]]:
    """`stop_signals`; a compilation that was stopped has made nothing that could be saved."""
    try:
        with stop_signals() as stopped:
            yield stopped
    except StoppedWhileCompilingError as stop:
        saved = "what was saved before is kept: go on with --resume"
        none = "nothing was saved before: start again"
        raise TrainingStopped(
            f"stopped while compiling; {saved if run.state.exists() else none}", stop.number
        ) from stop


def _teller(say: Callable[[str], None]) -> Callable[[Source, str], None]:
    """Says which images of a source could not be read, in any process, and what was done; each of them once."""
    from accelerate.utils import gather_object

    told: set[str] = set()

    def tell(source: Source, consequence: str) -> None:
        found = sorted(set(gather_object(sorted(source.unreadable))) - told)
        told.update(found)
        if found:
            say(f"{len(found)} images cannot be read, {consequence}: {shorten(found)}")

    return tell


def _record(run: Run, history: Sequence[Epoch], model: ConvMixer, names: dict[str, Any]) -> None:
    """Write what an epoch adds to the run's folder, beside the state for resuming, which comes last."""
    with run.saving("last.safetensors") as path:
        save_weights(model, path, names)
    if _best(run.recipe, history) == history[-1].epoch:
        with run.saving("best.safetensors") as path:
            save_weights(model, path, names)
    with run.saving("metrics.csv") as path:
        write_history(path, history)
    rows = [dataclasses.asdict(row) for row in history]
    run.write_json("metrics.json", [{k: None if v != v else v for k, v in row.items()} for row in rows])  # no NaN


def _draw(run: Run, history: Sequence[Epoch]) -> None:
    with run.saving("plots/history.png") as path:
        write_figure(plot_history(history), path)


def _circumstances(where: torch.device) -> dict[str, Any]:
    """Command, hardware and versions."""
    ours = Path(sys.argv[0]).name in ("convmixer", "__main__.py")
    processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "command": shlex.join(["convmixer", *sys.argv[1:]]) if ours else None,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


def _accelerator(where: torch.device, trackers: Sequence[str], folder: Path, mixed_precision: str) -> Accelerator:
    """The processes of this run."""
    optional("matplotlib.figure", "training", "train")  # for the curves, after an epoch's work
    accelerate = optional("accelerate", "training", "train")
    # What accelerate remembers of an earlier run in this process, perhaps on another device, holds no longer.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator: Accelerator = accelerate.Accelerator(
            cpu=where.type == "cpu",
            mixed_precision=mixed_precision,
            log_with=list(trackers) or None,
            project_dir=str(folder),
        )
    except ValueError as error:
        raise ArgumentError(f"trackers={list(trackers)!r}, mixed_precision={mixed_precision!r}: {error}") from error
    missing = set(trackers) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if missing:
        raise ArgumentError(f"trackers={list(trackers)!r}: install {', '.join(sorted(missing))} first")
    return accelerator
