"""One step, and one epoch of them: the model, its optimizer and its average, the same path on every device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmixer.data.memory import Share, Source, class_weights, seed_all
from convmixer.errors import ConvMixerError
from convmixer.factory import create_model
from convmixer.model import ConvMixer, mirror
from convmixer.runtime.cuda_graphs import Graphed, Graphs
from convmixer.training.augment import Augment, Part
from convmixer.training.optimizers import Average, create_optimizer, takes_tensors
from convmixer.training.recipes import Recipe
from convmixer.training.validation import Progress
from convmixer.transforms import preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECK_EVERY = 50  # steps between looks at the loss, which make a GPU wait
ADVICE = (
    "Set a lower lr, or clip_grad, and train in another folder; --set checkpoint=last.safetensors of this one starts "
    "from the epochs before"
)


def build_model(recipe: Recipe, classes: tuple[str, ...], device: torch.device, *, fused: bool) -> ConvMixer:
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


def synchronised(model: ConvMixer) -> ConvMixer:
    """A model of the same tensors whose BatchNorm sees the images of all processes."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin: ConvMixer = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, shared))
    return twin


@torch.no_grad()
def diagnose(model: ConvMixer, inputs: Tensor) -> str:
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
class PartialEpoch:
    """How far an epoch is: steps done, and over them the sum of losses, the correct images, the seconds."""

    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0


class Trainer:
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
        self.model = build_model(recipe, images.classes, where, fused=fused)
        self.learner = self.model
        if recipe.sync_batchnorm and fused:
            self.model.set_fused(sync_batchnorm=True)
        elif recipe.sync_batchnorm:
            self.learner = synchronised(self.model)
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

    def epoch(
        self, epoch: int, place: PartialEpoch, stopped: Callable[[], int], progress: Progress
    ) -> tuple[PartialEpoch, int]:
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
                    cause = diagnose(self.model, inputs)
                raise ConvMixerError(
                    f"the loss became {self.sums[0].item()} in epoch {epoch + 1}, step {step + 1} or shortly before, "
                    f"at a learning rate of {self.rate(epoch, step):.2g}: {cause}. {ADVICE}"
                )
            if number:
                break
        loss, correct = self.accelerator.reduce(self.sums).tolist()
        return PartialEpoch(step + 1, loss, correct, time.perf_counter() - begun), number

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
