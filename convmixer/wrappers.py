"""The model inside what others put around one: compilers, parallel training, averages of weights, extractors."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from timm.models._features import FeatureGetterNet
from timm.models.convmixer import ConvMixer as TimmConvMixer
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from convmixer.errors import ArgumentError

T = TypeVar("T", bound=nn.Module)

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)
KNOWN = "torch.compile, DataParallel, DistributedDataParallel, torch's AveragedModel and timm's ModelEma, V2 and V3"


def is_compiled(module: Any) -> bool:
    """Return whether a module is what `torch.compile` puts around one, as `_orig_mod`."""
    return "_orig_mod" in getattr(module, "_modules", ())  # importing its class takes a second


def unwrap(model: Any) -> Any:
    """Return the model inside any number of wrappers that compute the same; a model in none of them as it is.

    Of an average of weights, return the average.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(model, ModelEma):
            model = model.ema
        elif is_compiled(model):
            model = model._orig_mod
        else:
            return model


def find_inner(model: Any) -> Any:
    """Return the model that holds the layers, out of wrappers and out of timm's feature extractor."""
    found = unwrap(model)
    return found.model if isinstance(found, FeatureGetterNet) else found


def copy_module(module: T) -> T:
    """Copy a module deeply, also where hooks compute weights, as pruning's do; deepcopy alone refuses these tensors."""
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def find_model(model: Any) -> nn.Module:
    """Return the model inside wrappers: a ConvMixer of this package or timm, an optimized one, or an extractor of one.

    Raises:
        ArgumentError: Something else, or something else around a model; the text names it.
    """
    found = find_inner(model)
    ours = all(hasattr(found, name) for name in ("num_classes", "num_features", "in_chans"))
    if not ours and not isinstance(found, TimmConvMixer):
        raise ArgumentError(f"{describe(found)} is not a ConvMixer: {ADVICE}")
    whole: nn.Module = unwrap(model)
    return whole


def in_channels(model: Any) -> int:
    """Return the channels of the images that a model takes; 3 if it does not say."""
    found = find_inner(model)
    if isinstance(found, TimmConvMixer):
        return int(found.stem[0].in_channels)
    return int(getattr(found, "in_chans", 3))


def describe(model: Any) -> str:
    """Return the class of an object, for messages."""
    kind = type(model)
    return f"a {kind.__module__}.{kind.__qualname__}"


ADVICE = (
    "give a model of convmixer.create_model. If something else is around one, give the model inside it; "
    f"{KNOWN} are looked into"
)
