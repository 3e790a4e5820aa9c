"""One step of training, and an epoch of steps: one path for every device, precision and number of processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.data.memory import ImageSet, Share, class_weights, seed_all
from convmixer.errors import ConvMixerError
from convmixer.factory import create_model
from convmixer.model import ConvMixer, mirror
from convmixer.runtime.cuda_graphs import Graphed, Graphs
from convmixer.training import schedule
from convmixer.training.augment import Augment, Part
from convmixer.training.distillation import Teacher, distillation_loss
from convmixer.training.optimizers import Average, create_optimizer, takes_tensors
from convmixer.training.precision import DTYPES
from convmixer.training.recipe import Recipe
from convmixer.training.validation import Progress
from convmixer.transforms import preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECK_EVERY = 50  # steps between checks of the loss, which make a GPU wait
ADVICE = (
    "Set a lower lr, or clip_grad, and train in another folder; --set checkpoint=last.safetensors of this one starts "
    "from the epochs before"
)


def build_model(
    recipe: Recipe, classes: tuple[str, ...], device: torch.device, *, fused: bool | Literal["auto"]
) -> ConvMixer:
    """Return the model that a recipe starts from, for these classes, on a device."""
    rates = {n: getattr(recipe, n) for n in ("drop_rate", "block_drop_rate", "drop_path_rate")}
    torch.manual_seed(recipe.seed)
    model: ConvMixer = create_model(
        recipe.model,
        pretrained=recipe.pretrained,
        checkpoint=recipe.checkpoint or None,
        device=device,
        dtype=torch.float32,
        num_classes=len(classes),
        in_chans=recipe.in_chans,
        fused=fused,
        **rates,
        **recipe.sizes,
    )
    config = preprocessing(model)
    size = (recipe.in_chans, *(recipe.input_size or config["input_size"][1:]))
    config |= {"label_names": classes, "num_classes": len(classes), "input_size": size}
    model.pretrained_cfg = config
    return model


def with_sync_batchnorm(model: ConvMixer) -> ConvMixer:
    """Return a model that shares the tensors of this one, and whose BatchNorm sees the images of all processes."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin: ConvMixer = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, shared))
    return twin


@torch.no_grad()
def find_nonfinite(model: ConvMixer, inputs: Tensor) -> str:
    """Return where values stop being finite: a parameter, the input, or the first layer whose output has them."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} is not finite"
    if not inputs.isfinite().all():
        return "the images are not finite"
    layers: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                layers.append(name)

        return hook

    twin: Any = mirror(model)
    twin.fused = False  # fused blocks call no layers, so no hooks
    for name, module in twin.named_modules():
        if name:
            module.register_forward_hook(note(name))
    twin(inputs)
    return f"the output of {layers[0]} is not finite" if layers else "the gradients of the step before were not finite"


@dataclasses.dataclass(frozen=True)
class PartialEpoch:
    """How far an epoch is.

    Attributes:
        step: Number of steps done.
        loss: Sum of their losses.
        correct: Number of their images that were classified correctly.
        seconds: Wall time that they took.
    """

    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0


class Trainer:
    """A model, its optimizer and the average of its weights, and what a step does to them.

    Args:
        recipe: What to train, and how.
        images: Training images.
        device: Where this process trains.
        accelerator: The processes of the run.
        compile: Compile the model with `torch.compile`.
        fused: Use fused blocks; "auto" if native kernels can compute them.
        graphs: Captures steps, or None to launch every kernel of each step.
        not_captured: Takes the error of a capture that failed; if it returns, training goes on without graphs.
        report: Takes what is assumed of a teacher.

    Attributes:
        model: The model that learns.
        images: The training images, on the device.
        steps: Number of steps in an epoch.
        sums: The sum of losses and the number of correct images (2,), over the epoch so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSet,
        device: torch.device,
        accelerator: Accelerator,
        *,
        compile: bool,
        fused: bool | Literal["auto"],
        graphs: Graphs | None = None,
        not_captured: Callable[[RuntimeError], None] = lambda error: None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe, self.device, self.accelerator, self.compile = recipe, device, accelerator, compile
        self.graphs, self.not_captured = graphs, not_captured
        self.images = images.to(device)
        self.model = build_model(recipe, images.classes, device, fused=fused)
        self.train_model = self.model
        if recipe.sync_batchnorm and fused is True:
            self.model.set_fused(sync_batchnorm=True)
        elif recipe.sync_batchnorm:
            self.train_model = with_sync_batchnorm(self.model)
        self.optimizer = accelerator.prepare_optimizer(  # with it, gradients of float16 are scaled
            create_optimizer(recipe, self.model, device), device_placement=False
        )
        self.average = Average(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.augment = Augment(recipe, preprocessing(self.model), len(images.classes), device)
        weights = class_weights(recipe, images)
        self.class_weights = None if weights is None else weights.to(device)
        self.teacher: Teacher | None = None
        if recipe.teacher:
            dtype = DTYPES[accelerator.mixed_precision]
            self.teacher = Teacher(
                recipe.teacher,
                preprocessing(self.model),
                images.classes,
                device,
                dtype,
                sizes=self.augment.sizes(),
                report=report,
            )
        self.parts_per_step = recipe.accumulate * accelerator.num_processes
        self.steps = len(images) // recipe.batch_size
        self.head_only: bool | None = None
        self.compiled: Any = None
        self.rates_are_tensors = takes_tensors(recipe.opt, device)
        # Tensors, since a graph reads and writes them. `scheduled` has the rate of each group, and the weight of the
        # new values in the average.
        self.scheduled = torch.zeros(len(self.optimizer.param_groups) + 1, dtype=torch.float32, device=device)
        self.sums = torch.zeros(2, dtype=torch.float32, device=device)
        self._link_rates()

    def _link_rates(self) -> None:
        """Let each group of the optimizer read its rate from `scheduled`."""
        if self.rates_are_tensors:
            for group, rate in zip(self.optimizer.param_groups, self.scheduled, strict=False):
                group["lr"] = rate

    @property
    def eval_model(self) -> ConvMixer:
        """The model that is validated and saved: the average, if there is one."""
        return self.average.module if self.average else self.model

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to go on from here."""
        average = self.average.module.state_dict() if self.average else None
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        optimizer = self.optimizer.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "average": average,
            "scaler": scaler,
            "teacher": self.teacher.checksum if self.teacher else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, perhaps on another device."""
        self.model.load_state_dict(state["model"])
        for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            saved |= {k: group[k] for k in ("fused", "capturable") if k in group}
        self.optimizer.load_state_dict(state["optimizer"])
        self._link_rates()
        if self.average:
            self.average.module.load_state_dict(state["average"])
        if self.accelerator.scaler and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _set_phase(self, *, head_only: bool) -> None:
        """Let all layers learn, or only the head; a frozen backbone keeps its BatchNorm statistics."""
        self.head_only = head_only
        for part in (self.model.stem, self.model.blocks):
            part.requires_grad_(not head_only)
        self.compiled = self.train_model
        if self.accelerator.num_processes > 1:  # accelerate changes `forward`: that of a shell around the model
            self.compiled = self.accelerator.prepare_model(nn.Sequential(self.compiled))
        if self.compile:  # one compilation per image size is faster than one for all of them
            self.compiled = torch.compile(self.compiled, dynamic=False)
        self.compute = Graphed(self._compute, self.graphs, self._train_without_graphs)

    def _train_without_graphs(self, error: RuntimeError) -> None:
        """Go on without graphs after a capture failed."""
        self.graphs = None
        self.optimizer.zero_grad()  # gradients of the capture hold no values
        self.not_captured(error)

    def close(self) -> None:
        """Free the memory of graphs, and the model that gathers the gradients of other processes."""
        self.compute = Graphed(self._compute, None, self._train_without_graphs)
        self.compiled = None

    def train_mode(self) -> None:
        """Set training mode, except for a frozen backbone."""
        self.train_model.train()
        if self.head_only:
            self.train_model.stem.eval()
            self.train_model.blocks.eval()

    def fraction_done(self, epoch: int, step: int) -> float:
        """Return the part of the run, in [0, 1], that is over before a step."""
        return (epoch * self.steps + step) / (self.recipe.epochs * self.steps)

    def learning_rate(self, epoch: int, step: int) -> float:
        """Return the learning rate of a step, as in its middle."""
        return schedule.learning_rate(self.recipe, (epoch + (step + 0.5) / self.steps) / self.recipe.epochs)

    def _schedule(self, epoch: int) -> Tensor:
        """Return the values of `scheduled` in each step of an epoch (steps, groups + 1)."""
        rates = torch.tensor([self.learning_rate(epoch, step) for step in range(self.steps)], dtype=torch.float64)
        scales = torch.tensor(
            [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups], dtype=torch.float32
        )
        done = epoch * self.steps + torch.arange(1, self.steps + 1)
        weights = self.average.weight(done) if self.average else torch.zeros(self.steps)
        return torch.column_stack([rates[:, None] * scales, weights]).to(self.device, torch.float32)

    def epoch(
        self, epoch: int, partial: PartialEpoch, stopped: Callable[[], int], progress: Progress
    ) -> tuple[PartialEpoch, int]:
        """Train from where an epoch was left to its end, or until a signal.

        Args:
            epoch: Its number, from 0.
            partial: How far it is.
            stopped: Returns the number of the signal that came, or 0.
            progress: Shows the steps.

        Returns:
            How far the epoch is now, and the number of the signal, or 0.
        """
        begun = time.perf_counter() - partial.seconds
        steps = range(partial.step, self.steps)
        parts = self._parts(epoch, steps)
        # What was done before an interruption counts for the first process.
        done = torch.tensor([partial.loss, partial.correct], dtype=torch.float32)
        self.sums.copy_(done * self.accelerator.is_main_process)
        self.schedule = self._schedule(epoch)
        signal, step = 0, partial.step - 1
        self.train_mode()
        for step in progress(steps, f"epoch {epoch + 1}/{self.recipe.epochs}"):
            inputs = self.step(parts, epoch, step)
            check = step % CHECK_EVERY == CHECK_EVERY - 1 or step == self.steps - 1
            signal = stopped()
            if self.accelerator.num_processes > 1:  # all must stop at one step, or they wait for each other
                signal = self._highest(signal) if check else 0
            if (check or signal) and not self.sums.isfinite().all():
                self._raise_nonfinite(epoch, step, inputs)
            if signal:
                break
        loss, correct = self.accelerator.reduce(self.sums).tolist()
        return PartialEpoch(step + 1, loss, correct, time.perf_counter() - begun), signal

    def _parts(self, epoch: int, steps: range) -> Iterator[Part]:
        """Yield what this process computes in these steps, part after part."""
        first = self.accelerator.process_index * self.recipe.accumulate
        own = range(first, first + self.recipe.accumulate)
        share = Share(self.recipe.seed, epoch, self.recipe.batch_size, self.parts_per_step, own, steps)
        return self.augment.prepared(self.images, share, lambda step: self.fraction_done(epoch, step))

    def _highest(self, number: int) -> int:
        """Return the highest of the processes' numbers."""
        highest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest)

    def _raise_nonfinite(self, epoch: int, step: int, inputs: Tensor) -> None:
        """Raise a ConvMixerError that says where values stopped being finite."""
        with self.accelerator.autocast():
            cause = find_nonfinite(self.model, inputs)
        raise ConvMixerError(
            f"the loss became {self.sums[0].item()} in epoch {epoch + 1}, step {step + 1} or shortly before, "
            f"at a learning rate of {self.learning_rate(epoch, step):.2g}: {cause}. {ADVICE}"
        )

    def _part(self, parts: Iterator[Part], epoch: int, step: int, i: int) -> Part:
        """Return the next part of a step, the i-th of this process."""
        part = next(parts)
        # For dropout and stochastic depth.
        seed_all(self.recipe.seed, epoch, step, self.accelerator.process_index * self.recipe.accumulate + i)
        # Augmentation may leave other strides, which would be compiled again.
        return part._replace(inputs=part.inputs.contiguous())

    def step(self, parts: Iterator[Part], epoch: int, step: int) -> Tensor:
        """Train a step on the next of these parts, and add its losses and correct images to `sums`.

        Returns:
            The last inputs.
        """
        head_only = self.fraction_done(epoch, step) < self.recipe.frozen
        if self.head_only is not head_only:
            self._set_phase(head_only=head_only)
            self.train_mode()
        self.scheduled.copy_(self.schedule[step])
        if not self.rates_are_tensors:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(epoch, step) * group.get("lr_scale", 1.0)
        for i in range(self.recipe.accumulate):
            part = self._part(parts, epoch, step, i)
            self.compute(*part, last=i == self.recipe.accumulate - 1)
        return part.inputs

    def _compute(self, inputs: Tensor, targets: Tensor, labels: Tensor, *, last: bool) -> None:
        """Compute the gradients of a part of a step, and after the last part update the weights."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.compiled):
            with self.accelerator.autocast():
                logits: Tensor = self.compiled(inputs)
                options: Any = {"label_smoothing": self.recipe.label_smoothing, "reduction": "sum"}
                # PyTorch's mean is over the class weights of labels, but over the number of mixed targets.
                loss = F.cross_entropy(logits.float(), targets, self.class_weights, **options) / len(targets)
            if self.teacher:
                distance = distillation_loss(logits.float(), self.teacher(inputs), self.recipe.temperature)
                loss = torch.lerp(loss, distance, self.recipe.distillation)
            self.accelerator.backward(loss / self.recipe.accumulate)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach() / self.parts_per_step, correct])
        if last:
            self._update()

    def _update(self) -> None:
        """Change the weights and their average by the gradients."""
        if self.recipe.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.scheduled[-1])
