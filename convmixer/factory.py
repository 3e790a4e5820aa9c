"""`create_model`, and timm's entrypoints from the same table: where names, files and the module meet."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, load_pretrained, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convmixer.errors import ArgumentError, DataError, UnknownModelError, WeightsError, nearest
from convmixer.hub import client
from convmixer.hub.checkpoints import (
    check_keys,
    prepared_as,
    read_header,
    read_shapes,
    read_tensors,
    recognise,
    variant_of,
)
from convmixer.hub.config import read_config
from convmixer.model import ConvMixer, as_dtype, check_dtype, check_head, plain, take_indices
from convmixer.ops import prefers_channels_last
from convmixer.pyramid import FeaturePyramid, check_reductions
from convmixer.registry import HUB_FILE, UNNAMED, VARIANTS, WEIGHTS_FOLDER, Variant, Weights, get_variant
from convmixer.wrappers import find_inner

__all__ = ["create_model", "extractor", "open_model", "open_run", "read_recipe", "resolve_device"]

# What may be set per model; the rest of the constructor (device, dtype) has parameters of its own in create_model.
_MODEL_ARGS = [p for p in inspect.signature(ConvMixer).parameters if p not in ("device", "dtype")]
_FEATURE_ARGS = ["features_only", "out_indices"]
_PYRAMID_ARGS = ["pyramid", "pyramid_channels", "return_dict"]


def _config(variant: Variant, weights: Weights | None) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a variant and, if given, one set of its weights."""
    patches = tuple(side // variant.patch_size for side in variant.input_size[1:])
    config: dict[str, Any] = {
        "architecture": variant.name,
        "num_classes": variant.num_classes,
        "pool_size": patches,
        **variant.preprocessing,
        "first_conv": "stem.0",
        "classifier": "head",
        "paper_ids": "arXiv:2201.09792",
        "paper_name": "Patches Are All You Need?",
    }
    if weights is not None:
        config |= {"tag": weights.tag, "license": weights.licence.lower(), "label_names": weights.label_names}
        if weights.path is not None:
            config |= {"file": str(weights.path)}
        elif weights.hub_id:
            at = "" if weights.revision == "main" else f"@{weights.revision}"
            config |= {"hf_hub_id": f"{weights.hub_id}{at}", "hf_hub_filename": HUB_FILE}
    return config


def _build(variant: Variant, pretrained: bool = False, **model_args: Any) -> ConvMixer | FeatureGetterNet:
    """Build a variant as timm does; `model_args` override its architecture."""
    indices = plain(model_args.pop("out_indices", 3))
    feature_cfg = {"out_indices": indices, "feature_cls": "getter"}
    model: ConvMixer | FeatureGetterNet = build_model_with_cfg(
        ConvMixer, variant.name, pretrained, feature_cfg=feature_cfg, **{**variant.architecture, **model_args}
    )
    return model


# ---- names ----------------------------------------------------------------------------------------------------------


@dataclass
class _Resolved:
    """What a name stands for: an architecture, its configuration, and a weights file (None: there is none)."""

    variant: Variant
    config: dict[str, Any]
    model_args: dict[str, Any]
    weights: Path | None


def _resolve(name: str, pretrained: bool, revision: str | None, **hub_options: Any) -> _Resolved:
    scheme, _, location = name.partition(":")
    if scheme == "local-dir":
        if revision:
            raise ArgumentError(f"revision={revision!r} is for a repository of the Hub, not for {name!r}: leave it out")
        folder = Path(os.path.expanduser(location))
        weights_file = folder / "model.safetensors" if pretrained else None
        return _from_config(folder / "config.json", weights_file, name)
    if scheme == "hf-hub":
        repo_id, _, at = location.partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
            raise ArgumentError(f"{name!r}: give hf-hub:owner/repo or hf-hub:owner/repo@revision")
        if at and revision and at != revision:
            raise ArgumentError(f"{name!r} names one revision and revision={revision!r} another: give one of them")
        options = {"revision": at or revision, **hub_options}
        config = client.fetch(repo_id, "config.json", **options)
        options["revision"] = config.parent.name  # the same commit, whatever is pushed meanwhile
        return _from_config(config, client.fetch(repo_id, HUB_FILE, **options) if pretrained else None, name)
    if location:
        raise ArgumentError(f"{name!r}: unknown scheme {scheme!r}; valid: variant, variant.tag, hf-hub:, local-dir:")
    variant, weights = get_variant(name)
    # Without its weights a model knows nothing of their classes.
    source = _Resolved(variant, _config(variant, weights if pretrained else None), {}, None)
    if pretrained:
        if weights is None:
            raise WeightsError(f"{variant.name} has no weights. {variant.note}")
        source.weights = _registered(f"{variant.name}.{weights.tag}", weights, revision, **hub_options)
    return source


def _registered(name: str, weights: Weights, revision: str | None, **hub_options: Any) -> Path:
    """Return the file of registered weights: from the package, else from the Hub, checked against the record."""
    if weights.path is not None and not revision:
        return weights.path
    if not weights.hub_id:
        if weights.path is None:
            raise WeightsError(
                f"{name} ships with the package, but {weights.file!r} is missing in {str(WEIGHTS_FOLDER)!r}, and no "
                "repository on the Hub is known: install the package again, or give the file as checkpoint="
            )
        raise ArgumentError(f"revision={revision!r}: {name} ships with the package; leave it out")
    options = {"revision": revision or weights.revision, **hub_options}
    if not revision:  # another one holds another file
        options |= {"size": weights.size, "sha256": weights.sha256}
    return client.fetch(weights.hub_id, HUB_FILE, prefer_cache=True, **options)


def _from_config(path: Path, weights: Path | None, name: str) -> _Resolved:
    config = read_config(path, name)
    if weights is not None:
        # Only by the header, before anything is built: no memory is allocated that the file does not fill.
        says = {**config.variant.architecture, **config.model_args, "num_classes": config.preprocessing["num_classes"]}
        found = recognise(read_shapes(weights), repr(str(weights)))
        wrong = [f"{key}={says[key]}, but the weights have {n}" for key, n in found.items() if says[key] != n]
        if wrong:
            raise WeightsError(f"{name}: config.json does not fit {str(weights)!r}: it says {'; '.join(wrong)}")
    return _Resolved(config.variant, _config(config.variant, None) | config.preprocessing, config.model_args, weights)


def _check_names(given: dict[str, Any], valid: list[str], what: str) -> None:
    for name in given:
        if name not in valid:
            raise ArgumentError(f"{what} {name!r} is unknown; {nearest(name, valid)}")


# ---- the factory ----------------------------------------------------------------------------------------------------


@overload
def create_model(name: str, pretrained: bool = ..., *, pyramid: Sequence[int], **arguments: Any) -> FeaturePyramid: ...


@overload
def create_model(
    name: str,
    pretrained: bool = ...,
    *,
    features_only: Literal[False] = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype | str | None = ...,
    channels_last: bool | None = ...,
    fused: bool | Literal["auto"] = ...,
    checkpoint: str | Path | None = ...,
    revision: str | None = ...,
    cache_dir: str | Path | None = ...,
    token: str | bool | None = ...,
    local_files_only: bool = ...,
    **model_args: Any,
) -> ConvMixer: ...


@overload
def create_model(
    name: str, pretrained: bool = ..., *, features_only: Literal[True], **arguments: Any
) -> FeatureGetterNet: ...


@overload
def create_model(
    name: str, pretrained: bool = ..., *, features_only: bool, **arguments: Any
) -> ConvMixer | FeatureGetterNet: ...


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    channels_last: bool | None = None,
    fused: bool | Literal["auto"] = False,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **model_args: Any,
) -> ConvMixer | FeatureGetterNet | FeaturePyramid:
    """Build a ConvMixer, load weights into it, and move it to a device. It comes in training mode, as in timm.

    Args:
        name: `variant`, `variant.tag`, `hf-hub:owner/repo[@revision]` or `local-dir:path`; see `list_models` and
            `list_pretrained`.
        pretrained: Load the weights that the name stands for: from the package, else from the Hub's local cache, else
            from the Hub.
        device: "auto" takes the accelerator if there is one, else the CPU.
        dtype: Type of the parameters, such as `torch.bfloat16` or "bfloat16"; None takes PyTorch's default,
            float32.
        channels_last: Memory layout of the feature maps: True computes the blocks in channels_last, False leaves the
            layout to images and weights, as in any module. None takes channels_last where it is known to be faster: on
            CPUs, and on GPUs where this package's kernels run, else with 5x5 and 7x7 kernels. The weights lie as
            usual; the attribute `channels_last` of the model may be set at any time.
        fused: As in `ConvMixer.set_fused`: True, False, or "auto".
        checkpoint: A .safetensors file to load instead of the named weights. Its number of classes and channels hold
            unless `model_args` say otherwise.
        revision: Branch, tag or commit of a Hub repository.
        cache_dir: Cache folder to use instead of the Hub's own.
        token: Access token for the Hub.
        local_files_only: Never touch the network, like `HF_HUB_OFFLINE=1`.
        **model_args: Arguments of `ConvMixer`, and `features_only=True` with `out_indices` for a backbone that returns
            a list of feature maps. A `num_classes` other than the weights' gives a new random head; other `in_chans`
            adapt the first convolution as timm does. `pyramid=(4, 8, 16, 32)` makes maps of these reductions, with
            `pyramid_channels` (256), `out_indices` and `return_dict` as in `FeaturePyramid`: new layers on the loaded
            backbone, and no head.

    Returns:
        A `ConvMixer`; with `features_only` timm's `FeatureGetterNet` around one; with `pyramid` a `FeaturePyramid`.

    Raises:
        UnknownModelError: No such model or weights.
        ArgumentError: An argument that is unknown or makes no sense.
        WeightsError: Weights that cannot be found, read or fitted. No half-loaded model is left behind.
        ConvMixerError: `fused=True`, and it is not possible; see `ConvMixer.set_fused`.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu").eval()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if not isinstance(name, str):
        raise ArgumentError(f"name={name!r}: give a string; for a folder local-dir:PATH")
    own = set(inspect.signature(create_model).parameters) - {"model_args"}
    _check_names(model_args, [*own, *_MODEL_ARGS, *_FEATURE_ARGS, *_PYRAMID_ARGS], "argument")
    pyramid_args = _take_pyramid_args(model_args)
    features_only = bool(model_args.get("features_only", False))
    if "out_indices" in model_args and not features_only:
        raise ArgumentError("out_indices chooses feature maps: set features_only=True or pyramid=(...) with it")
    kind = as_dtype(dtype)
    if kind is not None:
        check_dtype(kind)
    target = resolve_device(device)
    cache_dir = cache_dir and os.path.expanduser(cache_dir)
    hub_options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    source = _resolve(name, pretrained and checkpoint is None, revision, **hub_options)
    weights = Path(os.path.expanduser(checkpoint)) if checkpoint is not None else source.weights
    config = source.config
    tensors = None
    if weights is not None:
        tensors = read_tensors(weights)
        if checkpoint is not None:
            config |= _config_of_checkpoint(weights, tensors, config)
    if model_args.get("num_classes", config["num_classes"]) != config["num_classes"]:
        config |= UNNAMED  # a new head, whose classes have no names yet
    arguments = {**source.model_args, **model_args, "pretrained_cfg": config}
    if tensors is None or weights is None:
        model = _build(source.variant, device=target, dtype=kind, **arguments)
    else:
        # Without storage until the file's tensors are put in place: nothing is initialised only to be overwritten.
        with _NoInit():
            model = _build(source.variant, device="meta", **arguments)
        depth = arguments.get("depth", source.variant.depth)  # more than is left of a pruned backbone
        _load(find_inner(model), tensors, config, depth, weights)
        if target.type != "cpu" or kind is not None:
            model.to(device=target, dtype=kind)
    if channels_last is None:
        kernel_size = arguments.get("kernel_size", source.variant.kernel_size)
        channels_last = prefers_channels_last(target, kind or torch.float32, kernel_size)
    inner = find_inner(model)
    inner.channels_last = channels_last
    inner.set_fused(fused)
    return FeaturePyramid(model, **pyramid_args) if pyramid_args else model


def _take_pyramid_args(model_args: dict[str, Any]) -> dict[str, Any]:
    """Take out of model_args what `FeaturePyramid` is built with, and leave what its backbone is built with."""
    reductions = model_args.pop("pyramid", None)
    given = {name: model_args.pop(name) for name in _PYRAMID_ARGS[1:] if name in model_args}
    if reductions is None:
        if given:
            raise ArgumentError(f"{', '.join(given)} without pyramid: add reductions, such as pyramid=(4, 8, 16, 32)")
        return {}
    taken = {"reductions": check_reductions("pyramid", reductions)}
    if model_args.pop("features_only", False):
        raise ArgumentError(f"pyramid={reductions!r} returns feature maps itself: leave features_only out")
    head = [name for name in ("num_classes", "global_pool", "drop_rate") if model_args.pop(name, None)]
    if head:
        raise ArgumentError(f"{', '.join(head)} with pyramid={reductions!r}: a pyramid has no head, so leave it out")
    model_args |= {"num_classes": 0, "global_pool": ""}
    for name, argument in (("pyramid_channels", "channels"), ("return_dict", "return_dict")):
        if name in given:
            taken[argument] = given[name]
    if "out_indices" in model_args:
        taken["out_indices"] = model_args.pop("out_indices")
    return taken


def open_model(
    source: str | Path, *, checkpoint: str | Path | None = None, device: str | torch.device = "auto"
) -> ConvMixer:
    """Open a model with its weights, from whatever a user calls a model.

    Args:
        source: The folder of a finished run of `convmixer train`, a .safetensors file of a variant's shapes, or any
            name of `create_model`.
        checkpoint: A .safetensors file to load instead of its weights.
        device: As in `create_model`.

    Raises:
        DataError: A folder that is not a finished run.
        ConvMixerError: As `create_model`.
    """
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        run = Path(source)
        return open_run(run, read_recipe(run), checkpoint=checkpoint, device=device)
    if os.path.isfile(source):
        return create_model(variant_of(source), checkpoint=checkpoint or source, device=device)
    try:
        return create_model(source, pretrained=True, checkpoint=checkpoint, device=device)
    except UnknownModelError as error:
        if ":" in source:
            raise
        raise UnknownModelError(f"no folder or file {source!r}, and no model: {error}") from error


def extractor(model: ConvMixer, blocks: Sequence[int]) -> FeatureGetterNet:
    """Wrap a model as `create_model(features_only=True, out_indices=blocks)` does, and cut it after the last block."""
    taken, _ = take_indices(blocks, len(model.blocks))
    wrapped = FeatureGetterNet(model, tuple(sorted(taken)))
    config = {k: v for k, v in model.pretrained_cfg.items() if k not in ("num_classes", "classifier")}
    wrapped.pretrained_cfg = config  # type: ignore[assignment]
    return wrapped


def open_run(
    run: Path, recipe: dict[str, Any], *, checkpoint: str | Path | None = None, device: str | torch.device = "auto"
) -> ConvMixer:
    """Open the model of a run's folder, given what `read_recipe` returns; raise DataError if it has no weights."""
    weights = Path(checkpoint) if checkpoint else run / "model.safetensors"
    if not checkpoint and not weights.is_file():
        raise DataError(
            f"{str(run)!r} has no model.safetensors, which the end of a run writes: finish it with --resume, or "
            f"load best.safetensors as the checkpoint of {recipe['model']}"
        )
    sizes: dict[str, Any] = dict(recipe.get("model_args", ()))
    model: ConvMixer = create_model(recipe["model"], checkpoint=weights, device=device, **sizes)
    return model


def read_recipe(run: Path) -> dict[str, Any]:
    """Read recipe.json of a folder of `convmixer train`; raise DataError if the folder is not that of a run."""
    try:
        recipe: dict[str, Any] = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        if not isinstance(recipe["model"], str):
            raise TypeError("model is not a text")
        if not all(isinstance(number, int) for number in dict(recipe.get("model_args", ())).values()):
            raise TypeError("model_args has a size that is not a whole number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "give a run, or a model's name such as those of `convmixer list`"
        if (run / "config.json").is_file():
            hint = f"it is in the Hub's form, so give local-dir:{run}"
        raise DataError(
            f"{str(run)!r} is not the folder of a run, which has a recipe.json that names a model "
            f"({type(error).__name__}: {error}): {hint}"
        ) from error
    return recipe


class _NoInit(TorchFunctionMode):
    """Leaves out initialisers: on the meta device there is nothing to fill, and the calls are a third of the time."""

    FILLS = (nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.fill_, Tensor.zero_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (args or list((kwargs or {}).values()))[0] if func in self.FILLS else func(*args, **(kwargs or {}))


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device meant; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ArgumentError: There is no such device here.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(f"no device {device!r} here ({reason}); valid: auto, cpu, cuda, ...") from error
    return target


def _config_of_checkpoint(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return what a weights file says: classes and channels by its shapes, the rest by its header."""
    found: dict[str, Any] = {**UNNAMED, "tag": None, "file": None, "hf_hub_id": None, "hf_hub_filename": None}
    head, stem = tensors.get("head.weight"), tensors.get("stem.0.weight")
    if head is not None and head.ndim == 2:
        found["num_classes"] = head.shape[0]
    if stem is not None and stem.ndim == 4 and stem.shape[1] != config["input_size"][0]:
        found["input_size"] = (stem.shape[1], *config["input_size"][1:])
    header = read_header(path)
    found |= prepared_as(header, found.get("input_size", config["input_size"]))
    return found | {key: value for key, value in header.items() if key == "label_names"}


def _load(model: ConvMixer, tensors: dict[str, Tensor], config: dict[str, Any], depth: int, source: Path) -> None:
    """Fill a model on the meta device from the weights of one with `depth` blocks; head and stem may be adapted."""
    new_head = model.num_classes != config["num_classes"]
    adapted: tuple[str, ...] = ("head.weight", "head.bias") if new_head else ()
    if model.in_chans != config["input_size"][0]:
        adapted += ("stem.0.weight",)
    pruned = tuple(f"blocks.{i}." for i in range(len(model.blocks), depth))
    expected = model.state_dict()
    unpruned = {key: tensor for key, tensor in tensors.items() if not key.startswith(pruned)}
    if not new_head:
        check_head(unpruned, model, str(source))
    check_keys(unpruned, expected, str(source), may_differ=adapted, path=source)
    # The file's tensors become the model's parameters, so they must have their type.
    tensors = {key: tensor.to(expected[key].dtype) if key in expected else tensor for key, tensor in unpruned.items()}
    load_pretrained(model, {**config, "state_dict": tensors}, num_classes=model.num_classes, in_chans=model.in_chans)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()  # type: ignore[operator]


# ---- timm's entrypoints ---------------------------------------------------------------------------------------------

_OURS = [variant for variant in VARIANTS if not timm.is_model(variant.name)]
# timm's register_model looks for this name in the module of the entrypoint.
default_cfgs = generate_default_cfgs(
    {
        f"{variant.name}.{weights.tag}" if weights else variant.name: _config(variant, weights)
        for variant in _OURS
        for weights in variant.weights or (None,)
    }
)


def _register(variant: Variant) -> None:
    def entrypoint(pretrained: bool = False, **model_args: Any) -> nn.Module:
        return _build(variant, pretrained, **model_args)

    entrypoint.__name__ = entrypoint.__qualname__ = variant.name
    entrypoint.__doc__ = f"{variant.name} for `timm.create_model`."
    globals()[variant.name] = register_model(entrypoint)


for _variant in _OURS:
    _register(_variant)
