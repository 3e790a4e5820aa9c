"""What changes the weights in a step: the optimizer of a recipe, and the average of the weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from timm.optim import (
    Lookahead,
    Muon,
    create_optimizer_v2,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor
from torch.optim import Optimizer

from convmixer.errors import ArgumentError
from convmixer.model import ConvMixer
from convmixer.training.recipe import LOOKAHEAD, Recipe

MUON = {  # arguments of timm's Muon; the others are its defaults
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 5,
    "ns_coefficients": "original",
    "adjust_lr_fn": "match_rms_adamw",
}
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]  # of the Newton-Schulz iteration: timm's "original"


class BatchedMuon(Muon):  # type: ignore[misc]
    """timm's Muon with the arguments `MUON`, for parameters (out, in, 1, 1), in one batch for all of a shape.

    timm's own class computes one after the other, in two dozen small kernels each.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters that have gradients. A closure is not called."""
        for group in self.param_groups:
            # Parameters of each shape, their gradients and their momenta.
            shapes: dict[torch.Size, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                lists = shapes.setdefault(parameter.shape, ([], [], []))
                for tensors, tensor in zip(lists, (parameter, parameter.grad, state["momentum_buffer"]), strict=True):
                    tensors.append(tensor)
            for lists in shapes.values():
                self._update(*lists, group)

    @staticmethod
    def _update(
        parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], group: dict[str, Any]
    ) -> None:
        """Update parameters p of one shape, in place, by gradients g, momenta m, and the rate and decay of a group.

            m = momentum*m + (1 - momentum)*g      ahead = momentum*m + (1 - momentum)*g, Nesterov's
            p = p*(1 - lr*weight_decay) - lr*scale*orthogonalized(ahead)

        where `adjust_lr_fn` makes scale of the shape of a matrix (out, in).
        """
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).flatten(2)
        directions = zeropower_via_newtonschulz(ahead, group["ns_steps"], COEFFICIENTS, eps=group["eps"])
        rate = group["lr"]
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        changes = directions.float() * (-rate * get_lr_scale(ahead.shape, group["adjust_lr_fn"]))
        torch._foreach_add_(parameters, list(changes.view(-1, *parameters[0].shape)))


class MuonAdamW(Optimizer):
    """Muon for some parameter groups and AdamW for the others, as one optimizer with one state.

    timm's Muon has its own AdamW, which launches a dozen kernels for each parameter. PyTorch's launches a few for all
    parameters.

    Args:
        matrices: Groups of parameters (out, in, 1, 1), for Muon.
        others: Groups of all other parameters, for AdamW.
        lr: Rate of both.
        muon: Further arguments of timm's Muon.
        adamw: Further arguments of PyTorch's AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        muon: dict[str, Any],
        adamw: dict[str, Any],
    ) -> None:
        self.muon, self.adamw = BatchedMuon(matrices, lr=lr, **muon), torch.optim.AdamW(others, lr=lr, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both work on the state and the groups of this optimizer, which are saved."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.muon.step()
        self.adamw.step()
        return loss


def create_optimizer(recipe: Recipe, model: ConvMixer, device: torch.device) -> Optimizer:
    """Return the optimizer of a recipe: weight decay on weights of two or more dimensions, rates by `layer_decay`.

    If `takes_tensors`, rates may be tensors, and on CUDA devices a graph can hold a step.

    Raises:
        ArgumentError: The optimizer needs a package, or a device, that is missing.
    """
    name = recipe.opt
    betas: dict[str, Any] = {"betas": recipe.betas} if recipe.betas else {}
    if name.removeprefix(LOOKAHEAD) == "muon":
        muon = _create_muon(recipe, model, device, betas)
        return Lookahead(muon) if name.startswith(LOOKAHEAD) else muon
    try:
        optimizer: Optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
            fallback_list=_not_matrices(model) if name.endswith("muon") else (),
            **betas,
            **_tensor_arguments(name, device),
        )
    except (AssertionError, ImportError) as error:  # timm asserts that there is APEX, bitsandbytes or CUDA
        raise ArgumentError(
            f"opt={recipe.opt!r} cannot be used here: {error}. Give another, such as 'adamw'"
        ) from error
    return optimizer


def _create_muon(recipe: Recipe, model: ConvMixer, device: torch.device, betas: dict[str, Any]) -> MuonAdamW:
    common = {"no_weight_decay_list": model.no_weight_decay(), "fallback_list": _not_matrices(model)}
    groups: list[dict[str, Any]] = (
        param_groups_layer_decay(model, recipe.weight_decay, layer_decay=recipe.layer_decay, **common)
        if recipe.layer_decay < 1
        else param_groups_weight_decay(model, recipe.weight_decay, **common)
    )
    divided: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for group in groups:
        divided[group.pop("use_fallback", False)].append(group)
    return MuonAdamW(
        divided[False],
        divided[True],
        lr=recipe.lr,
        muon={**MUON, "capturable": device.type == "cuda"},
        adamw={"eps": recipe.eps, **betas, **_tensor_arguments("adamw", device)},
    )


def _not_matrices(model: ConvMixer) -> list[str]:
    """Return the names of all parameters except the 1x1 weights of blocks."""
    matrices = [f"blocks.{i}.1.weight" for i in range(len(model.blocks))]
    return [name for name, _ in model.named_parameters() if name not in matrices]


def takes_tensors(name: str, device: torch.device) -> bool:
    """Return whether an optimizer takes tensors for rates on a device; on CUDA devices graphs can capture it then."""
    return bool(_tensor_arguments("adamw" if name == "muon" else name, device))


def _tensor_arguments(name: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments that let an optimizer take tensors for rates; empty if it cannot."""
    kind = None if name.startswith(LOOKAHEAD) else get_optimizer_info(name).opt_class
    if not isinstance(kind, type):  # Lookahead counts steps on the host; those of APEX and bitsandbytes are names
        return {}
    arguments = {}
    if device.type in ("cpu", "cuda") and issubclass(kind, torch.optim.Adam | torch.optim.SGD):  # AdamW is an Adam
        arguments["fused"] = True
    if device.type == "cuda" and "capturable" in inspect.signature(kind).parameters:
        arguments["capturable"] = True
    return arguments


class Average:
    """An exponential moving average of the parameters and buffers of a model.

    Attributes:
        module: A model that holds the averages.
    """

    def __init__(self, model: ConvMixer, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(model).eval(), decay
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.floats = [(average, value) for average, value in pairs if average.is_floating_point()]
        self.counters = [(average, value) for average, value in pairs if not average.is_floating_point()]

    def weight(self, step: Tensor) -> Tensor:
        """Return the weight of the new values after steps 1, 2, ...: larger at first, while weights change fast."""
        return 1 - ((1 + step.double()) / (10 + step)).clamp(max=self.decay)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Move towards the model by a weight in [0, 1], a tensor () that a CUDA graph can read."""
        averages, values = map(list, zip(*self.floats, strict=True))
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        if self.counters:
            counters, counts = map(list, zip(*self.counters, strict=True))
            torch._foreach_copy_(counters, counts)
