"""Turn checkpoints of other programs into safetensors with this package's names."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convmixer.errors import ArgumentError, WeightsError
from convmixer.factory import create_model
from convmixer.files import check_writable, write_atomically
from convmixer.hub.checkpoints import (
    PICKLES,
    check_finite,
    check_keys,
    is_pickle,
    matching_variant,
    read_header,
    read_metadata,
    read_tensors,
    recognise,
    save_weights,
)
from convmixer.hub.config import HEADER_CHECKS
from convmixer.hub.foreign import find_tensors
from convmixer.hub.publish import save_pretrained
from convmixer.hub.write_config import architecture
from convmixer.model import ConvMixer
from convmixer.registry import SHAPE, get_variant
from convmixer.tracing import computing


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    variant: str | None = None,
    act_layer: str | None = None,
) -> str:
    """Turn a checkpoint of another program into safetensors with this package's names.

    Reads the paper's flat Sequential names, timm's and mmpretrain's; state dicts at any depth of a checkpoint; and the
    prefixes that wrappers such as DataParallel, `torch.compile`, Lightning and transformers add. Where a checkpoint has
    averaged weights, they are taken. BatchNorms without `num_batches_tracked` get a zero. A pickle is opened with
    `weights_only=True`: it cannot run code. What was written is read again and computed once before it is put in place.

    Args:
        source: A .pth, .pth.tar, .pt, .bin or .ckpt file, or a .safetensors file with other names.
        destination: The .safetensors file to write, for `checkpoint=` of a variant. Or a folder, for
            `create_model("local-dir:FOLDER")`, which may have any size. A pickle does not tell preprocessing: the
            folder's config.json then has that of the variant, or of the most similar one.
        variant: The variant that it must be; None takes the one that has the shapes of the tensors.
        act_layer: Activation of the model in a folder, which shapes do not tell; None takes the variant's, or GELU for
            sizes that no variant has.

    Returns:
        The name for `create_model`: that of the variant, or `local-dir:FOLDER`.

    Raises:
        UnknownModelError: No such variant.
        ArgumentError: A destination that is neither a .safetensors file nor a folder; `act_layer` for a file.
        WeightsError: The file cannot be read safely, is not a ConvMixer, or is one of no variant and the destination
            is a file.
        WriteError: The destination's folder takes no files.

    Example:
        >>> torch.save(convmixer.create_model("convmixer_256_8").state_dict(), "theirs.pth")
        >>> convmixer.convert_checkpoint("theirs.pth", "ours.safetensors")
        'convmixer_256_8'
    """
    source, destination = Path(os.path.expanduser(source)), Path(os.path.expanduser(destination))
    asked = None if variant is None else get_variant(variant)[0]
    as_folder = _is_folder(destination)
    if act_layer is not None and not as_folder:
        raise ArgumentError(
            f"act_layer={act_layer!r}: a .safetensors file does not say its activation; give a folder as destination"
        )
    named = repr(str(source))
    if not as_folder:
        check_writable(destination)
    tensors, header = _read(source)
    sizes = recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()}, named)
    if asked and any(sizes[name] != getattr(asked, name) for name in SHAPE):
        wanted, has = ({name: get(name) for name in SHAPE} for get in (lambda n: getattr(asked, n), sizes.get))
        raise WeightsError(f"{named} is not a {asked.name}, which has {_listed(wanted)}: it has {_listed(has)}")
    match = asked or matching_variant(sizes)
    if match is None and not as_folder:
        raise WeightsError(
            f"{named} has {_listed({name: sizes[name] for name in SHAPE})}, which no variant of the registry has: "
            f"write a folder, which says so: convmixer convert {shlex.quote(str(source))} "
            f"{shlex.quote(str(destination.with_suffix('')))}"
        )
    arguments: dict[str, Any] = {**sizes, "act_layer": act_layer or (match.act_layer if match else "gelu")}
    model = ConvMixer(**arguments, device="meta")
    check_keys(tensors, model.state_dict(), named)
    check_finite(tensors, named)
    model.load_state_dict(tensors)

    def write(path: Path) -> None:
        save_weights(model, path, header | ({"architecture": match.name} if match else {}))
        read_header(path)
        _compute(read_tensors(path), arguments, named)

    if not as_folder:
        assert match is not None
        write_atomically(destination, write)
        return match.name
    with tempfile.TemporaryDirectory(prefix="convmixer-", ignore_cleanup_errors=True) as temporary:
        file = Path(temporary) / "model.safetensors"
        write(file)
        base = match.name if match else architecture({n: arguments[n] for n in (*SHAPE, "act_layer")})[0]
        save_pretrained(create_model(base, checkpoint=file, device="cpu", **arguments), destination)
    return f"local-dir:{destination}"


_FILES = (".onnx", ".xml", ".pte", ".pt2", ".mlpackage", ".h5", ".keras", ".npz", ".msgpack", ".json", ".zip", ".gguf")


def _is_folder(destination: Path) -> bool:
    if destination.suffix == ".safetensors" and not os.path.isdir(destination):
        return False
    if os.path.isfile(destination) or destination.suffix in (*PICKLES, *_FILES):
        raise ArgumentError(f"cannot write {str(destination)!r}: give a file that ends in .safetensors, or a folder")
    return True


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by our names, and what else the header of a safetensors file says that is worth keeping."""
    if not os.path.isfile(source):
        raise WeightsError(f"no checkpoint at {str(source)!r}, or none that may be read")
    named = repr(str(source))
    header: dict[str, str] = {}
    if is_pickle(source):
        content = _unpickle(source)
    else:
        content = read_tensors(source)
        header = {key: text for key, text in read_metadata(source).items() if key in HEADER_CHECKS}
    tensors = find_tensors(content, named)
    for key in [k for k in tensors if k.endswith(".running_mean")]:
        tensors.setdefault(f"{key.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    return tensors, header


def _unpickle(source: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script keeps its arguments so
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error class of its own
        # PyTorch's text goes on to explain how to run the code.
        found = re.search(r"Unsupported (global|class|operand)[^\n]*", str(error))
        reason = found[0] if found else type(error).__name__
        raise WeightsError(
            f"cannot read {str(source)!r} without running code from it: {reason}. "
            "Ask whoever wrote it for a file of only the state dict"
        ) from error


@torch.inference_mode()
def _compute(written: dict[str, Tensor], arguments: dict[str, Any], named: str) -> None:
    """Raise WeightsError where a model with these weights computes what is not finite."""
    model = ConvMixer(**arguments, device="meta")
    model.load_state_dict({k: t.float() if t.is_floating_point() else t for k, t in written.items()})
    side = 2 * model.patch_size
    with computing():
        outputs = model.eval()(torch.zeros(1, model.in_chans, side, side, dtype=torch.float32))
    if not outputs.isfinite().all():
        raise WeightsError(f"{named}: the model computes values that are not finite. Is it another variant?")


def _listed(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())
