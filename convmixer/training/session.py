"""The training loop: one numeric path for every device, a checkpoint after every epoch, exact resume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.data.memory import (
    Fit,
    Share,
    Source,
    class_weights,
    fitting,
    hold_out,
    load_images,
    seed_all,
    shorten,
)
from convmixer.data.readers import READERS, SHARDS, has_split
from convmixer.data.stream import open_stream
from convmixer.errors import ArgumentError, ConvMixerError, DependencyError, TrainingStopped, optional
from convmixer.factory import create_model, resolve_device
from convmixer.hardware import bf16_is_faster, cpu_name
from convmixer.hub.checkpoints import read_tensors, save_weights
from convmixer.inference import class_logits
from convmixer.model import ConvMixer, evaluation_view, mirror
from convmixer.native import library as native
from convmixer.ops.fused import cannot_compile
from convmixer.plots import plot_history, write_figure
from convmixer.runtime.cuda_graphs import CudaGraphs, Graphed, Graphs
from convmixer.tracing import computing
from convmixer.training.augment import Augment, Part
from convmixer.training.history import Epoch, write_history
from convmixer.training.optimizers import Average, create_optimizer, takes_tensors
from convmixer.training.recipes import Recipe
from convmixer.training.run import Run
from convmixer.training.signals import StoppedWhileCompilingError, stop_signals
from convmixer.transforms import normalization, preprocessing
from convmixer.wrappers import find_model

if TYPE_CHECKING:
    from accelerate import Accelerator

DRAW_EVERY = 10  # seconds between drawings of the curves, which take half a second
CHECK_EVERY = 50  # steps between looks at the loss, which make a GPU wait
_ADVICE = (
    "Set a lower lr, or clip_grad, and train in another folder; --set checkpoint=last.safetensors of this one starts "
    "from the epochs before"
)

Progress = Callable[..., Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run leaves: the trained model, its history, and top-1 in percent per test set."""

    model: ConvMixer
    history: list[Epoch]
    test_accuracy: dict[str, float]
    weights: Path


def _no_progress(items: Iterable[Any], _description: str = "") -> Iterable[Any]:
    return items


PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # in accelerate's words


def choose_precision(device: torch.device, precision: str) -> str:
    """ "float32", "bfloat16" or "float16" by `precision`, one of them or "auto": bfloat16 where it is faster."""
    if precision == "auto":
        return "bfloat16" if bf16_is_faster(device) else "float32"
    if precision not in PRECISIONS:
        raise ArgumentError(f"unknown precision {precision!r}; valid: auto, {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type != "cuda":
        raise ArgumentError(f"precision 'float16' needs a GPU, not {device.type!r}; valid: auto, float32, bfloat16")
    return precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Computes in the numbers of `choose_precision`."""
    chosen = choose_precision(device, precision)
    return contextlib.nullcontext() if chosen == "float32" else torch.autocast(device.type, getattr(torch, chosen))


@contextlib.contextmanager
def _no_denormals(device: torch.device) -> Iterator[None]:
    """On a CPU, numbers below 1e-38 count as zero meanwhile: with them a step takes up to twice as long."""
    flushing = float(torch.tensor(1e-40)) == 0
    if device.type == "cpu" and not flushing:
        torch.set_flush_denormal(True)  # in this thread, and in those that it starts from here on
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)


@torch.inference_mode()
def evaluate(
    model: ConvMixer,
    images: Source,
    *,
    batch_size: int = 64,  # larger activations are mapped anew for every batch on a CPU
    precision: str = "float32",
    progress: Progress = _no_progress,
) -> dict[str, float]:
    """Loss and top-1 accuracy over a split, without augmentation. Wrappers of the model are looked into.

    Returns:
        `{"loss": mean cross entropy, "top1": percent, "count": images}`.
    """
    model = find_model(model)
    device = next(model.parameters()).device
    normalize = normalization(preprocessing(model))
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    seen = 0
    view = evaluation_view(model)
    for pixels, labels in progress(images.in_order(batch_size), "validating"):
        with computing(), autocast(device, precision):
            logits = class_logits(view(normalize(pixels.to(device))).float())
        labels = labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    count = seen or math.nan  # no images, no figures
    return {"loss": loss.item() / count, "top1": 100 * correct.item() / count, "count": seen}


def _new_model(recipe: Recipe, classes: tuple[str, ...], device: torch.device, *, fused: bool) -> ConvMixer:
    rates = {n: getattr(recipe, n) for n in ("drop_rate", "block_drop_rate", "drop_path_rate")}
    torch.manual_seed(recipe.seed)
    model: ConvMixer = create_model(
        recipe.model,
        pretrained="." in recipe.model,
        checkpoint=recipe.checkpoint or None,
        device=device,
        num_classes=len(classes),
        in_chans=recipe.in_chans,
        fused=fused,
        **rates,
    )
    config = preprocessing(model)
    size = (recipe.in_chans, *(recipe.input_size or config["input_size"][1:]))
    config |= {"label_names": classes, "num_classes": len(classes), "input_size": size}
    model.pretrained_cfg = config  # type: ignore[assignment]
    return model


def _synchronised(model: ConvMixer) -> ConvMixer:
    """A model of the same tensors whose BatchNorm sees the images of all processes."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin: ConvMixer = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, shared))
    return twin


def _best(recipe: Recipe, history: Sequence[Epoch]) -> int:
    """Number of the epoch with the lowest validation loss, later ones lower by more than `min_delta`; 0 is none."""
    best, lowest = 0, math.inf
    for row in history:
        if row.validation_loss < lowest - recipe.min_delta:
            best, lowest = row.epoch, row.validation_loss
    return best


@torch.no_grad()
def _diagnose(model: ConvMixer, inputs: Tensor) -> str:
    """Where values stop being finite: a parameter, the input, or the first layer whose output has them."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} is not finite"
    if not inputs.isfinite().all():
        return "the images are not finite"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    twin: Any = mirror(model)
    twin.fused = False  # fused blocks call no layers, so no hooks
    for name, module in twin.named_modules():
        if name:
            module.register_forward_hook(look(name))
    twin(inputs)
    return f"the output of {found[0]} is not finite" if found else "the gradients of the step before were not finite"


@dataclasses.dataclass(frozen=True)
class _Place:
    """How far an epoch is: steps done, and over them the sum of losses, the correct images, the seconds."""

    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0


class _Trainer:
    """Model, optimizer and average of the weights, and what one step does to them."""

    def __init__(
        self,
        recipe: Recipe,
        images: Source,
        where: torch.device,
        accelerator: Accelerator,
        *,
        compile: bool,
        fused: bool,
        graphs: Graphs | None = None,
        not_captured: Callable[[RuntimeError], None] = lambda error: None,
    ) -> None:
        self.recipe, self.where, self.accelerator, self.compile = recipe, where, accelerator, compile
        self.graphs, self.not_captured = graphs, not_captured
        self.images = images.to(where)
        self.model = _new_model(recipe, images.classes, where, fused=fused)
        self.learner = self.model
        if recipe.sync_batchnorm and fused:
            self.model.set_fused(sync_batchnorm=True)
        elif recipe.sync_batchnorm:
            self.learner = _synchronised(self.model)
        self.optimizer = accelerator.prepare_optimizer(  # with it, gradients of float16 are scaled
            create_optimizer(recipe, self.model, where), device_placement=False
        )
        self.average = Average(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.augment = Augment(recipe, preprocessing(self.model), len(images.classes), where)
        weights = class_weights(recipe, images)
        self.class_weights = None if weights is None else weights.to(where)
        self.parts = recipe.accumulate * accelerator.num_processes
        self.steps = len(images) // recipe.batch_size
        self.head_only: bool | None = None
        self.compiled: Any = None
        # A graph reads and writes them: the rate of each group and the weight of the new values in the average; the sum
        # of losses and the number of correct images.
        self.tensor_rates = takes_tensors(recipe.opt, where)
        self.current = torch.zeros(len(self.optimizer.param_groups) + 1, device=where)
        self.sums = torch.zeros(2, device=where)
        self._link_rates()

    def _link_rates(self) -> None:
        if self.tensor_rates:
            for group, rate in zip(self.optimizer.param_groups, self.current, strict=False):
                group["lr"] = rate

    @property
    def kept(self) -> ConvMixer:
        """What is validated and saved."""
        return self.average.module if self.average else self.model

    def state(self) -> dict[str, Any]:
        average = self.average.module.state_dict() if self.average else None
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        optimizer = self.optimizer.state_dict()
        return {"model": self.model.state_dict(), "optimizer": optimizer, "average": average, "scaler": scaler}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            saved |= {k: group[k] for k in ("fused", "capturable") if k in group}  # it may come from another device
        self.optimizer.load_state_dict(state["optimizer"])
        self._link_rates()
        if self.average:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _set_phase(self, *, head_only: bool) -> None:
        """All layers learn, or the head alone; a frozen backbone keeps its BatchNorm statistics."""
        self.head_only = head_only
        for part in (self.model.stem, self.model.blocks):
            part.requires_grad_(not head_only)
        self.compiled = self.learner
        if self.accelerator.num_processes > 1:  # accelerate changes `forward`: that of a shell around the model
            self.compiled = self.accelerator.prepare_model(nn.Sequential(self.compiled))
        if self.compile:  # one compilation per image size is faster than one for all of them
            self.compiled = torch.compile(self.compiled, dynamic=False)
        self.compute = Graphed(self._compute, self.graphs, self._go_on)

    def _go_on(self, error: RuntimeError) -> None:
        """Go on without graphs after a capture failed."""
        self.graphs = None
        self.optimizer.zero_grad()  # gradients of the capture hold no values
        self.not_captured(error)

    def close(self) -> None:
        """Free the memory of graphs."""
        self.compute = Graphed(self._compute, None, self._go_on)

    def train_mode(self) -> None:
        self.learner.train()
        if self.head_only:
            self.learner.stem.eval()
            self.learner.blocks.eval()

    def done(self, epoch: int, step: int) -> float:
        """The part of the run that is over before a step."""
        return (epoch * self.steps + step) / (self.recipe.epochs * self.steps)

    def rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step."""
        return self.recipe.learning_rate((epoch + (step + 0.5) / self.steps) / self.recipe.epochs)

    def _schedule(self, epoch: int) -> Tensor:
        """What `current` is in each step of an epoch (steps, groups + 1)."""
        rates = torch.tensor([self.rate(epoch, step) for step in range(self.steps)], dtype=torch.float64)
        scales = torch.tensor([group.get("lr_scale", 1.0) for group in self.optimizer.param_groups])
        done = epoch * self.steps + torch.arange(1, self.steps + 1)
        weights = self.average.weight(done) if self.average else torch.zeros(self.steps)
        return torch.column_stack([rates[:, None] * scales, weights]).to(self.where, torch.float32)

    def epoch(self, epoch: int, place: _Place, stopped: Callable[[], int], progress: Progress) -> tuple[_Place, int]:
        """Train from a place in an epoch to its end, or until a signal.

        Returns:
            The place reached, and the number of the signal, or 0.
        """
        begun = time.perf_counter() - place.seconds
        first = self.accelerator.process_index * self.recipe.accumulate
        mine, steps = range(first, first + self.recipe.accumulate), range(place.step, self.steps)
        share = Share(self.recipe.seed, epoch, self.recipe.batch_size, self.parts, mine, steps)
        parts = self.augment.prepared(self.images, share, lambda step: self.done(epoch, step))
        # What was done before an interruption counts for the first process.
        self.sums.copy_(torch.tensor([place.loss, place.correct]) * self.accelerator.is_main_process)
        self.schedule = self._schedule(epoch)
        number, step = 0, place.step - 1
        self.train_mode()
        for step in progress(steps, f"epoch {epoch + 1}/{self.recipe.epochs}"):
            inputs = self.step(parts, epoch, step)
            look = step % CHECK_EVERY == CHECK_EVERY - 1 or step == self.steps - 1
            number = stopped()
            if self.accelerator.num_processes > 1:  # all must stop at one step, or they wait for each other
                number = self._agreed(number) if look else 0
            if (look or number) and not self.sums.isfinite().all():
                with self.accelerator.autocast():
                    cause = _diagnose(self.model, inputs)
                raise ConvMixerError(
                    f"the loss became {self.sums[0].item()} in epoch {epoch + 1}, step {step + 1} or shortly before, "
                    f"at a learning rate of {self.rate(epoch, step):.2g}: {cause}. {_ADVICE}"
                )
            if number:
                break
        loss, correct = self.accelerator.reduce(self.sums).tolist()
        return _Place(step + 1, loss, correct, time.perf_counter() - begun), number

    def _agreed(self, number: int) -> int:
        """The highest of the processes' numbers."""
        highest = torch.tensor(number, device=self.where)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest)

    def _part(self, parts: Iterator[Part], epoch: int, step: int, i: int) -> Part:
        """The next part of a step, the i-th of this process."""
        part = next(parts)
        # For dropout and stochastic depth.
        seed_all(self.recipe.seed, epoch, step, self.accelerator.process_index * self.recipe.accumulate + i)
        # Augmentation may leave other strides, which would be compiled anew.
        return part._replace(inputs=part.inputs.contiguous())

    def step(self, parts: Iterator[Part], epoch: int, step: int) -> Tensor:
        """One step on the next of these parts; its losses and correct images are added to `sums`.

        Returns:
            The last inputs.
        """
        head_only = self.done(epoch, step) < self.recipe.frozen
        if self.head_only is not head_only:
            self._set_phase(head_only=head_only)
            self.train_mode()
        self.current.copy_(self.schedule[step])
        if not self.tensor_rates:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(epoch, step) * group.get("lr_scale", 1.0)
        for i in range(self.recipe.accumulate):
            part = self._part(parts, epoch, step, i)
            self.compute(*part, last=i == self.recipe.accumulate - 1)
        return part.inputs

    def _compute(self, inputs: Tensor, targets: Tensor, labels: Tensor, *, last: bool) -> None:
        """Gradients of a part of a step, and after the last part the update."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.compiled):
            with self.accelerator.autocast():
                logits: Tensor = self.compiled(inputs)
                smoothing = self.recipe.label_smoothing
                loss = F.cross_entropy(logits.float(), targets, self.class_weights, label_smoothing=smoothing)
            self.accelerator.backward(loss / self.recipe.accumulate)
        self.sums += torch.stack([loss.detach() / self.parts, (logits.detach().argmax(1) == labels).sum()])
        if last:
            self._update()

    def _update(self) -> None:
        if self.recipe.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.current[-1])


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
    progress: Progress = _no_progress,
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
    _check_together(recipe, data, val, tests, where, workers, fused)
    numbers = choose_precision(where, precision)
    accelerator = _accelerator(where, trackers, run.folder, PRECISIONS[numbers])
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes > 1:
        where = accelerator.device
    first = accelerator.is_main_process
    progress_here = progress if first else _no_progress
    parts = recipe.accumulate * accelerator.num_processes
    if recipe.batch_size % parts or ((recipe.mixup or recipe.cutmix) and recipe.batch_size // parts % 2):
        raise ArgumentError(
            f"batch_size={recipe.batch_size} does not divide into {accelerator.num_processes} processes with "
            f"accumulate={recipe.accumulate} equal parts each, even ones for mixup and cutmix"
        )

    obstacle = _no_graph(recipe, where, numbers, accelerator.num_processes)
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

    with _no_denormals(where), run.locked() if first else contextlib.nullcontext():
        started = time.time()
        state = run.load() if resume else None
        with accelerator.main_process_first() if download else contextlib.nullcontext():
            training, validation, test_sets = _read(
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
        trainer = _Trainer(
            recipe,
            training,
            where,
            accelerator,
            compile=compile,
            fused=fused,
            graphs=CudaGraphs(where) if graph and not obstacle else None,
            not_captured=not_captured,
        )
        steps, history, place = trainer.steps, list[Epoch](), _Place()
        if state:
            try:
                trainer.load(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ConvMixerError(
                    f"cannot resume from {str(run.state)!r}: {error}. Another version of convmixer may have written "
                    "it: delete it to start anew"
                ) from error
            history = [Epoch(**row) for row in state["history"]]
            place = _Place(**state["place"])
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
                            f"the validation loss became {scores['loss']} after epoch {epoch + 1}. {_ADVICE}"
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
                    place = _Place()
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
                "data": _name(data),
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


def _check_together(
    recipe: Recipe,
    data: str | Path,
    val: str | Path | None,
    tests: Sequence[str | Path],
    where: torch.device,
    workers: int | None,
    fused: bool,
) -> None:
    """A recipe, data and a machine may each be fine and not go together."""
    shards = [source for source in map(str, (data, val, *tests)) if source.startswith(SHARDS)]
    if shards and not recipe.stream:
        raise ArgumentError(f"{shards[0]!r} is read from start to end: give stream=True (--set stream=true)")
    if val is None and ".tar" in str(data):  # of others, reading says whether they have validation images
        _check_hold_out(recipe, data)
    needs = {"balanced=True": recipe.balanced, "class_weights='balanced'": recipe.class_weights == "balanced"}
    for setting in (setting for setting, asked in needs.items() if asked and str(data).startswith(SHARDS)):
        raise ArgumentError(f"{setting} needs labels before images are read, which {str(data)!r} has not: leave it out")
    if workers is not None and (workers < 0 or not recipe.stream):
        raise ArgumentError(
            f"workers={workers}: give at least 0, and only with stream=True (--set stream=true): images in memory need "
            "none"
        )
    if recipe.sync_batchnorm and where.type != "cuda" and not fused:
        raise ArgumentError(
            f"sync_batchnorm=True works on GPUs alone, since torch has it for them, not on {where.type!r}: leave it "
            "out, or use fused blocks (fused=True, --fused), which have it on CPUs too"
        )
    rates = {name: getattr(recipe, name) for name in ("block_drop_rate", "drop_path_rate")}
    if fused and any(rates.values()):
        raise ArgumentError(
            f"fused=True with {', '.join(f'{n}={rate}' for n, rate in rates.items() if rate)} of the recipe: fused "
            "blocks have neither; leave fused out, or set them to 0"
        )


def _no_graph(recipe: Recipe, where: torch.device, precision: str, processes: int) -> str:
    """Why a step cannot be a CUDA graph, or ""."""
    reasons = {
        f"{where.type!r} is not a CUDA device": where.type != "cuda",
        f"{processes} processes exchange gradients within a step": processes > 1,
        f"accumulate={recipe.accumulate} makes several passes in a step": recipe.accumulate > 1,
        "float16 checks its gradients on the host": precision == "float16",
        f"the optimizer {recipe.opt!r} keeps numbers on the host": not takes_tensors(recipe.opt, where),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _check_hold_out(recipe: Recipe, data: str | Path) -> None:
    """An ArgumentError if validation images were to be held out of shards."""
    if str(data).startswith(SHARDS) and recipe.validation_fraction:
        raise ArgumentError(
            f"validation_fraction={recipe.validation_fraction}: shards are read from start to end, so no images of "
            f"{str(data)!r} can be held out: give 0, or a validation set (--val)"
        )


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


def _name(source: str | Path) -> str:
    """A data set without the place where it lies."""
    return str(source) if str(source).startswith((*READERS, SHARDS)) else Path(source).name


def _read(
    recipe: Recipe,
    data: str | Path,
    val: str | Path | None,
    tests: Sequence[str | Path],
    labels: str | Path | None,
    data_root: str | Path | None,
    download: bool,
    skip_unreadable: bool,
    workers: int | None,
    processes: int,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Source, Source, dict[str, Source]]:
    """Training, validation and test images, at the size that the model takes; says which were taken for what."""
    checkpoint = recipe.checkpoint or None  # may bring an image size of its own
    config: dict[str, Any] = create_model(recipe.model, checkpoint=checkpoint, device="meta").pretrained_cfg
    height, width = recipe.input_size or config["input_size"][1:]
    fit = Fit((recipe.in_chans, height, width), **fitting(config), draft=recipe.draft)
    common: dict[str, Any] = {
        "skip_unreadable": skip_unreadable,
        "root": data_root,
        "download": download,
        "report": say,
    }

    def read(
        source: str | Path, split: str, classes: tuple[str, ...] | None = None, labels: str | Path | None = None
    ) -> Source:
        if recipe.stream:
            mean = config["mean"] if recipe.in_chans == 3 else (sum(config["mean"]) / len(config["mean"]),)
            pool: dict[str, Any] = {"mean": mean, "workers": workers, "processes": processes}
            return open_stream(source, split, recipe, fit, classes=classes, labels=labels, **pool, **common)
        return load_images(
            source,
            split,
            fit.size,
            classes=classes,
            labels=labels,
            draft=recipe.draft,
            progress=lambda items: progress(items, f"reading {split}"),
            **fitting(config),
            **common,
        )

    images = read(data, "train", labels=labels)
    own = {split: has_split(data, split, labels=labels, root=data_root) for split in ("validation", "test")}
    training = images
    if val is None and not own["validation"]:
        _check_hold_out(recipe, data)
    if val is not None:
        validation = read(val, "validation", images.classes)
    elif own["validation"]:
        validation = read(data, "validation", images.classes, labels)
    else:
        training, validation = hold_out(images, recipe.validation_fraction, recipe.seed)
        held = f"{len(validation):,} of the training images, held out by validation_fraction"
        say(f"validation: {held if len(validation) else 'no images'}")
    test_sets: dict[str, Source] = {}
    if own["test"]:
        test_sets[_name(data)] = read(data, "test", images.classes, labels)
    for source in tests:
        name = _name(source)
        test_sets[str(source) if name in test_sets else name] = read(source, "test", images.classes)
    if not test_sets:
        say("test: no images")
    return training.balanced() if recipe.balanced else training, validation, test_sets
