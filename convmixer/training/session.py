"""A training run from start to finish: prepare, run the epochs, finish.

`train` names the phases in their order, and `_Session` has one method for each. What a step does is in `trainer.py`,
what the files of a run hold in `run.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from convmixer.data.memory import ImageSet
from convmixer.errors import ArgumentError, ConvMixerError, TrainingStopped, list_first
from convmixer.hub.checkpoints import read_tensors
from convmixer.inference import broken_tensor
from convmixer.model import ConvMixer
from convmixer.native import training as native
from convmixer.registry import PREPROCESSING
from convmixer.runtime.cuda_graphs import CudaGraphs
from convmixer.training.checks import check_counts, check_same_data, check_same_teacher, check_sources
from convmixer.training.history import Epoch, best_epoch
from convmixer.training.machine import Machine, prepare_machine, undisturbed
from convmixer.training.precision import flush_denormals
from convmixer.training.recipe import Recipe
from convmixer.training.run import RunFolder
from convmixer.training.signals import StoppedWhileCompilingError, stop_signals
from convmixer.training.splits import Sources, Splits, read_splits, source_name
from convmixer.training.trainer import ADVICE, PartialEpoch, Trainer
from convmixer.training.validation import Progress, evaluate, no_progress

DRAW_EVERY = 10  # seconds between drawings of the curves, which take half a second


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves.

    Attributes:
        model: The trained model, on the device that it was trained on.
        history: A row for each epoch.
        test_accuracy: Top-1 in percent, by the name of the test set.
        weights: The file `model.safetensors`.
    """

    model: ConvMixer
    history: list[Epoch]
    test_accuracy: dict[str, float]
    weights: Path


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
    fused: bool | Literal["auto"] = "auto",
    graph: bool | Literal["auto"] = "auto",
    trackers: Sequence[str] = (),
    progress: Progress = no_progress,
    report: Callable[[str], None] = print,
) -> TrainingResult:
    """Train a model, validate after every epoch, test at the end.

    Under `torchrun` or `accelerate launch` the processes share each step: `recipe.batch_size` counts the images of
    all of them, and BatchNorm sees those of its own process. Two processes compute what one does with
    `accumulate=2`, except for the running statistics of BatchNorm: those of the first process are saved.

    Args:
        recipe: From `get_recipe`.
        data: Source of the training split, and of the validation and test splits if it has them; see `load_images`.
        output: Folder of the run; `convmixer.training.run` says what it will hold.
        val: Source of the validation split, instead of one in `data` and of images held out.
        tests: Further test sets.
        labels: A table with the columns image and label for the images in `data`, instead of class folders. `val` and
            `tests` may be such tables themselves, in the folder of their images.
        data_root: Where downloaded data sets lie: by default `data` for `torch/`, the Hub's cache for `hfds/`.
        download: Let `torch/` data sets download what is missing.
        skip_unreadable: Leave out images that cannot be read, and say which. In a stream, others take their place in
            training.
        workers: Processes that decode a stream, for each process that trains; 0 decodes there. By default one per
            processor core. Only with `recipe.stream`.
        resume: Go on where `output` was left: with the same data and options, exactly as if there had been no
            interruption. Of the recipe only `epochs` may have changed.
        device: "auto" takes the accelerator if there is one.
        precision: "float32", "bfloat16" or "float16" (mixed precision; float16 on a GPU, with scaled gradients), or
            "auto": bfloat16 where the hardware multiplies matrices in it, else float32.
        compile: Use `torch.compile`; on a CPU it needs a C++ compiler, on a GPU Triton.
        fused: Use fused blocks, which keep less than half of the activations; see `ConvMixer.set_fused`. "auto" does so
            on a CPU if native kernels compute them, and reports why if they do not.
        graph: On a CUDA device, capture a step as one CUDA graph and replay it, so that the host need not launch each
            kernel. "auto" does so if it is possible, and else reports why it is not.
        trackers: Names of trackers that accelerate knows, such as "tensorboard"; they write into `output`.
        progress: Called as `progress(iterable, description)`, for a progress bar.
        report: Takes each line of text.

    Raises:
        ArgumentError: A setting that makes no sense, or a run in `output` that may not be continued or replaced.
        DataError: Data that cannot be found or read.
        TrainingStopped: SIGTERM or SIGINT came; all steps done are saved. While `torch.compile` is at work training
            stops at once, and what was saved before is kept.
        DependencyError: An optional library, or the compiler that `compile` needs, is missing.
        ConvMixerError: The loss became infinite or not a number, or the disk is full.

    Example:
        >>> from convmixer.training import get_recipe, train
        >>> recipe = get_recipe("cifar10", model_args=(("dim", 8), ("depth", 1)), epochs=1, batch_size=10)
        >>> result = train(recipe, "data/flowers", "runs/flowers", device="cpu", report=lambda line: None)
        >>> len(result.history), result.weights.name
        (1, 'model.safetensors')
    """
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"recipe={recipe!r}: give a Recipe, such as get_recipe('cifar10')")
    folder = RunFolder(output, recipe, resume=resume)
    sources = Sources(data, val, tests, labels, data_root, download, skip_unreadable, workers)
    check_sources(recipe, sources)
    with undisturbed(), contextlib.ExitStack() as stack:
        machine = prepare_machine(
            recipe,
            device,
            precision=precision,
            compile=compile,
            fused=fused,
            graph=graph,
            trackers=trackers,
            folder=folder.path,
        )
        stack.enter_context(flush_denormals(machine.device))
        session = stack.enter_context(contextlib.closing(_Session(recipe, folder, machine, progress, report)))
        stack.enter_context(session.locked())
        state = folder.load() if resume else None
        session.read_images(sources, state)
        session.build_trainer(state)
        session.begin(trackers)
        session.run_epochs()
        return session.finish(source_name(data))


class _Session:
    """What one call of `train` works on, and its phases in the order in which they run.

    Attributes:
        splits: The images, from `read_images` on.
        data_record: What must be the same of them when the run is resumed.
        trainer: From `build_trainer` on.
        history: A row for each finished epoch.
        partial: How far the epoch after those is.
    """

    splits: Splits
    data_record: dict[str, Any]
    trainer: Trainer

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        machine: Machine,
        progress: Progress,
        report: Callable[[str], None],
    ) -> None:
        self.recipe, self.folder, self.machine, self.report = recipe, folder, machine, report
        self.accelerator = machine.accelerator
        self.is_main = self.accelerator.is_main_process  # only that writes and reports
        self.progress = progress if self.is_main else no_progress
        self.history: list[Epoch] = []
        self.partial = PartialEpoch()
        self.started = time.time()
        self.drawn = -math.inf
        self.reported_unreadable: set[str] = set()

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder of the run: the main process does, for all of them."""
        return self.folder.locked() if self.is_main else contextlib.nullcontext()

    def close(self) -> None:
        """End the trackers, and leave the other processes.

        Threads that talk to them must end before the interpreter does, which aborts in some of them otherwise.
        """
        if hasattr(self, "trainer"):
            self.trainer.close()
        if self.accelerator.num_processes > 1:
            self.accelerator.free_memory()  # also collects garbage: a cycle holds the model that gathers gradients
        self.accelerator.end_training()

    def say(self, line: str) -> None:
        """Report a line, and log it."""
        if self.is_main:
            self.report(line)
            self.folder.log(line)

    # ---- prepare ----------------------------------------------------------------------------------------------------

    def read_images(self, sources: Sources, state: dict[str, Any] | None) -> None:
        """Read all splits; those of a resumed run must be what they were."""
        turns = self.accelerator.main_process_first() if sources.download else contextlib.nullcontext()
        with turns:
            self.splits = read_splits(sources, self.recipe, self.machine.processes, self.progress, self.say)
        check_counts(self.recipe, self.splits)
        self.data_record = self.splits.record()
        if state:
            check_same_data(self.folder.state_file, state["data"], self.data_record)

    def build_trainer(self, state: dict[str, Any] | None) -> None:
        """Build the model and all that trains it, in the state of the run that is resumed."""
        machine = self.machine
        self.trainer = Trainer(
            self.recipe,
            self.splits.training,
            machine.device,
            self.accelerator,
            compile=machine.compile,
            fused=machine.fused,
            graphs=CudaGraphs(machine.device) if machine.uses_graphs else None,
            not_captured=self._not_captured,
            report=self.say,
        )
        if not state:
            return
        teacher = self.trainer.teacher
        check_same_teacher(
            self.folder.state_file, self.recipe.teacher, state.get("teacher"), teacher.checksum if teacher else None
        )
        try:
            self.trainer.load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ConvMixerError(
                f"cannot resume from {str(self.folder.state_file)!r}: {error}. Another version of convmixer may have "
                "written it: delete it to start again"
            ) from error
        for name, value in self._computing().items():
            if (before := state.get("computing", {}).get(name, value)) != value:
                self.say(f"{name} was {before} before the interruption, and is {value} now: the results will differ")
        self.history = [Epoch(**row) for row in state["history"]]
        self.partial = PartialEpoch(**state["place"])

    def _computing(self) -> dict[str, Any]:
        """Return what changes results a little, and may change when a run is resumed."""
        return {"precision": self.machine.precision, "fused": self.trainer.model.fused}

    def _not_captured(self, error: RuntimeError) -> None:
        """Report that a step could not become a CUDA graph; raise an error if that was asked for."""
        if self.machine.graph is True:
            raise ConvMixerError(f"graph=True: capturing a step failed: {error}. Give 'auto', or False") from error
        self.say(f"capturing a step as a CUDA graph failed, so the run goes on without: {error}")

    def begin(self, trackers: Sequence[str]) -> None:
        """Write the first files, and say what is trained, where and on what."""
        machine = self.machine
        if self.folder.holds_old_run:
            self.say(f"this run replaces the one in {str(self.folder.path)!r}, which cannot be resumed")
        if self.is_main:
            self.folder.begin()
        if self.history and not self.partial.step:
            self._record_epoch()  # a run that was killed may not have come to it
        if trackers:
            self.accelerator.init_trackers("convmixer")
        processes = f"{machine.processes} x " if machine.processes > 1 else ""
        self.say(f"{self.recipe.model} on {processes}{machine.device.type}: {self.splits}")
        if machine.device.type == "cpu":
            self._say_fused()
        if machine.graph and machine.device.type == "cuda":
            obstacle = machine.graph_obstacle
            self.say(f"steps are not CUDA graphs: {obstacle}" if obstacle else "steps are CUDA graphs")

    def _say_fused(self) -> None:
        """Say what computes the blocks on a CPU, if it is fused blocks or was to be."""
        model, obstacle = self.trainer.model, self.machine.fused_obstacle
        reason = obstacle or native.refusal(model.stem, model.blocks, torch.float32, model.sync_batchnorm)
        if model.fused:
            self.say(f"blocks are fused, by {f'PyTorch: {reason}' if reason else 'native kernels'}")
        elif self.machine.fused == "auto" or obstacle:
            self.say(f"blocks are not fused: {reason or 'the log of convmixer.model says why'}")

    # ---- run the epochs ---------------------------------------------------------------------------------------------

    def run_epochs(self) -> None:
        """Train, validate and save, epoch after epoch.

        Raises:
            TrainingStopped: A signal came; all is saved.
        """
        with _stopping(self.folder) as stopped:
            for epoch in range(len(self.history), self.recipe.epochs):
                if self.recipe.patience and epoch - self._best_epoch() >= self.recipe.patience:
                    self.say(f"no better validation loss in {self.recipe.patience} epochs: stopped")
                    break
                self.partial, signal = self.trainer.epoch(epoch, self.partial, stopped, self.progress)
                self._report_unreadable(self.trainer.images, "others take their place")
                finished = self.partial.step == self.trainer.steps
                if finished:
                    self._finish_epoch(epoch)
                self._save_state()
                if finished:
                    self._record_epoch(draw=bool(signal))
                    self._log_epoch(self.history[-1])
                if signal and (not finished or epoch + 1 < self.recipe.epochs):
                    self._stop(epoch, signal)

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, and add a row to the history."""
        model = self.trainer.eval_model
        scores = self._from_main(lambda: {**self._evaluate(self.splits.validation), "broken": broken_tensor(model)})
        self._report_unreadable(self.splits.validation, "they are left out of validation")
        if len(self.splits.validation) and not math.isfinite(scores["loss"]):
            raise ConvMixerError(f"the validation loss became {scores['loss']} after epoch {epoch + 1}. {ADVICE}")
        if scores["broken"]:
            raise ConvMixerError(f"{scores['broken']} is not finite after epoch {epoch + 1}. {ADVICE}")
        self.history.append(self._row(epoch, scores))
        self.partial = PartialEpoch()

    def _record_epoch(self, *, draw: bool = False) -> None:
        """Write what the last epoch adds to the folder, and now and then the curves."""
        if not self.is_main:
            return
        self.folder.record_epoch(self.history, self.trainer.eval_model, self._metadata())
        if draw or time.monotonic() - self.drawn > DRAW_EVERY:
            self.folder.draw(self.history)
            self.drawn = time.monotonic()

    def _evaluate(self, images: ImageSet) -> dict[str, float]:
        return evaluate(self.trainer.eval_model, images, precision=self.machine.precision)

    def _row(self, epoch: int, scores: dict[str, float]) -> Epoch:
        steps, seconds = self.trainer.steps, self.partial.seconds
        images = steps * self.recipe.batch_size
        return Epoch(
            epoch=epoch + 1,
            learning_rate=self.trainer.learning_rate(epoch, steps - 1),
            train_loss=self.partial.loss / steps,
            train_accuracy=100 * self.partial.correct / images,
            validation_loss=scores["loss"],
            validation_accuracy=scores["top1"],
            seconds=seconds,
            images_per_second=images / seconds,
        )

    def _save_state(self) -> None:
        """Save all that resuming needs, before the other files of an epoch: these follow from it."""
        if self.is_main:
            rows = [dataclasses.asdict(row) for row in self.history]
            partial = dataclasses.asdict(self.partial)
            further = {"data": self.data_record, "computing": self._computing()}
            self.folder.save(**self.trainer.state(), history=rows, place=partial, **further)

    def _log_epoch(self, row: Epoch) -> None:
        self.accelerator.log({k: v for k, v in dataclasses.asdict(row).items() if k != "epoch"}, step=row.epoch)
        self.say(str(row))

    def _stop(self, epoch: int, signal: int) -> None:
        """Raise TrainingStopped, when the main process has saved."""
        self.accelerator.wait_for_everyone()
        step = self.partial.step
        inside = f"in epoch {epoch + 1} after step {step} of {self.trainer.steps}"
        reached = inside if step else f"after epoch {epoch + 1}"
        raise TrainingStopped(f"stopped {reached}, and saved: go on with --resume", signal)

    # ---- finish -----------------------------------------------------------------------------------------------------

    def finish(self, data: str) -> TrainingResult:
        """Test the resulting weights, and write the result.

        Args:
            data: Name of the data set, for the record.
        """
        self.accelerator.wait_for_everyone()  # for the last epoch's files
        if self.is_main and self.history:
            self.folder.draw(self.history)
        self.trainer.close()  # before the test images take memory
        model = self.trainer.eval_model
        if self.recipe.patience and self._best_epoch():
            model.load_state_dict(read_tensors(self.folder.best_weights))
            self.say(f"the weights of epoch {self._resulting_epoch().epoch} are the best and are kept")
        scores = self._from_main(lambda: self._test_and_record(model, data))
        for name, images in self.splits.tests.items():
            self._report_unreadable(images, f"they are left out of the test {name}")
        accuracy = {name: score["top1"] for name, score in scores.items()}
        if self.machine.fused == "auto":
            model.set_fused(False)  # nobody asked for fused blocks, which take no hooks
        return TrainingResult(model, self.history, accuracy, self.folder.weights)

    def _test_and_record(self, model: ConvMixer, data: str) -> dict[str, dict[str, float]]:
        """Write the weights, then what they reach on each test set."""
        self.folder.write_weights(self.folder.weights.name, model, self._metadata())
        scores = {name: evaluate(model, images, progress=self.progress) for name, images in self.splits.tests.items()}
        result = {
            **self.machine.describe(),
            "recipe": dataclasses.asdict(self.recipe),
            "data": data,
            "training_images": len(self.splits.training),
            "validation_accuracy": self._resulting_epoch().validation_accuracy if len(self.splits.validation) else None,
            "test_accuracy": {name: score["top1"] for name, score in scores.items()},
            "test_images": {name: score["count"] for name, score in scores.items()},
            "train_seconds": round(sum(row.seconds for row in self.history)),
            "last_session_seconds": round(time.time() - self.started),
            "processes": self.machine.processes,
        }
        self.folder.write_json("result.json", result)
        for name, score in scores.items():
            self.say(f"test {name}: top-1 {score['top1']:.2f} % of {score['count']} images")
        return scores

    # ---- what several phases need -----------------------------------------------------------------------------------

    def _best_epoch(self) -> int:
        return best_epoch(self.history, self.recipe.min_delta)

    def _resulting_epoch(self) -> Epoch:
        """Return the epoch whose weights are the result: with `patience` the best one, else the last one."""
        return self.history[(self._best_epoch() if self.recipe.patience else 0) - 1]

    def _metadata(self) -> dict[str, Any]:
        """Return what the header of a weights file says."""
        config: Any = self.trainer.model.pretrained_cfg
        return {
            "architecture": config["architecture"],
            "label_names": list(self.splits.training.classes),
            **{name: config[name] for name in PREPROCESSING},
        }

    def _from_main(self, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return to all processes what the main one computes."""
        from accelerate.utils import broadcast_object_list

        found: dict[str, Any] = broadcast_object_list([compute() if self.is_main else {}])[0]
        return found

    def _report_unreadable(self, source: ImageSet, consequence: str) -> None:
        """Say once which images of a source could not be read, in any process, and what was done."""
        from accelerate.utils import gather_object

        unreadable = set(gather_object(sorted(source.unreadable))) - self.reported_unreadable
        self.reported_unreadable |= unreadable
        if unreadable:
            shown = list_first(sorted(unreadable), separator="; ")
            self.say(f"{len(unreadable)} images cannot be read, {consequence}: {shown}")


@contextlib.contextmanager
def _stopping(folder: RunFolder) -> Iterator[Callable[[], int]]:
    """Enter `stop_signals`; a compilation that was stopped has made nothing that could be saved."""
    try:
        with stop_signals() as stopped:
            yield stopped
    except StoppedWhileCompilingError as stop:
        saved = "what was saved before is kept: go on with --resume"
        nothing = "nothing was saved before: start again"
        raise TrainingStopped(
            f"stopped while compiling; {saved if folder.state_file.exists() else nothing}", stop.number
        ) from stop
