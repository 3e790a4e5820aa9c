"""Tensors on disk: safetensors in and out, and the checks before anything reaches a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convmixer.errors import WeightsError, brief
from convmixer.files import write_atomically
from convmixer.hub.config import HEADER_CHECKS, check_values
from convmixer.hub.foreign import first_keys, our_names
from convmixer.hub.json_limits import header_excess, json_excess
from convmixer.model import count_outputs
from convmixer.registry import PREPROCESSING, SHAPE, UNNAMED, VARIANTS, Variant
from convmixer.wrappers import unwrap

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
_TEXTS = ("interpolation", "crop_mode")  # of a header, where the rest is JSON


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the model's state dict as safetensors: contiguous, on the CPU, whatever the model's layout.

    Args:
        model: Any module.
        path: File to write; replaced as a whole or not at all.
        metadata: Written into the header; values other than strings as JSON.
    """
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    write_atomically(path, lambda temporary: _write_tensors(tensors, temporary, {"format": "pt", **header}))


def digest(model: nn.Module) -> str:
    """Return a hash of a model's weights: the names, types, shapes and values of its state dict."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content: the library puts metadata in a random order."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # of the disk
        raise OSError(str(error)) from error
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(length))  # the same characters in another order, so that the tensors stay in place


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file, whose library checks the header; raise a WeightsError for what is wrong with it."""
    path = Path(os.path.expanduser(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileNotFoundError
        if excess := header_excess(path):
            raise WeightsError(f"{str(path)!r} has a header of {excess}: it holds no weights of a ConvMixer")
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(f"no weights file at {str(path)!r}: give the path of a .safetensors file") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, ValueError) as error:
        if is_pickle(path):
            raise WeightsError(
                f"{str(path)!r} is a pickle, which can run code when it is opened. Convert it once: "
                f"convmixer convert {shlex.quote(str(path))} {shlex.quote(path.name.split('.')[0])}.safetensors"
            ) from error
        raise WeightsError(
            f"{str(path)!r} is not a whole safetensors file ({path.stat().st_size} bytes): "
            f"{brief(str(error), 300)}. Fetch it again"
        ) from error


def _unreadable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"cannot read {str(path)!r}: {error.strerror or error}. Check the permissions and the disk")


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file's tensors, only from its header."""
    with _opened(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, mapped from disk rather than copied; all of them finite.

    Raises:
        WeightsError: The file is missing, a pickle, cut short or corrupt, or holds values that are not finite.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    check_finite(tensors, repr(str(path)))
    return tensors


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a WeightsError that names source and tensor where a value is not finite."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            # The sum is one fast pass; it is finite unless a value is not, or in rare cases overflows.
            if tensor.element_size() > 1 and math.isfinite(tensor.sum().item()):
                continue
            # In parts, because the masks need memory; float8 has no mask, so it is widened.
            parts = tensor.flatten().split(2**20)
            bad = sum(int((~(p.float() if p.element_size() == 1 else p).isfinite()).sum()) for p in parts)
            if bad:
                raise WeightsError(f"{source}: {brief(key)} has {bad} of {tensor.numel()} values that are not finite")


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings in the header of a safetensors file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the class names and the preprocessing that the header of a safetensors file says, by timm's names.

    Raises:
        WeightsError: A value is not JSON, too long, or makes no sense.
    """
    header, named = read_metadata(path), f"the header of {str(path)!r}"
    found: dict[str, Any] = {}
    for name in (known for known in HEADER_CHECKS if known in header):
        if excess := json_excess(header[name].encode()):
            raise WeightsError(f"{name} in {named} has {excess}")
        try:
            found[name] = header[name] if name in _TEXTS else json.loads(header[name])
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{name} in {named} is not JSON: {error}") from error
    return check_values(found, HEADER_CHECKS, named)


def prepared_as(header: Mapping[str, Any], size: Sequence[int] | None) -> dict[str, Any]:
    """Return the preprocessing of a header for a model that takes the channels of `size`, whatever the header says."""
    found = {name: header[name] for name in PREPROCESSING if name in header}
    if size and "input_size" in found:
        found["input_size"] = (size[0], *found["input_size"][1:])
    return found


# ---- which model a file is ------------------------------------------------------------------------------------------


def recognise(shapes: Mapping[str, Sequence[int]], source: str) -> dict[str, int]:
    """Return the constructor's sizes that the shapes of a ConvMixer's tensors tell: dim, depth, ..., num_classes.

    Args:
        shapes: By the keys of a state dict.
        source: Named in the error.

    Raises:
        WeightsError: They are not those of a ConvMixer.
    """
    stem, depthwise = shapes.get("stem.0.weight", ()), shapes.get("blocks.0.0.fn.0.weight", ())
    head = shapes.get("head.weight", (0, 0))
    blocks = {match[1] for key in shapes if (match := re.match(r"blocks\.([0-9]+)\.", key))}
    depth = len(blocks)
    if (len(stem), len(depthwise), len(head)) == (4, 4, 2) and blocks == {str(i) for i in range(depth)}:
        sizes = {"dim": stem[0], "depth": depth, "kernel_size": depthwise[3], "patch_size": stem[3]}
        sizes |= {"in_chans": stem[1]}
        if min(sizes.values()) > 0:
            return {**sizes, "num_classes": head[0]}
    raise WeightsError(f"{source} is not a ConvMixer: its keys are {first_keys(shapes)}")


def matching_variant(sizes: Mapping[str, int]) -> Variant | None:
    """Return the registry's variant of these sizes, whatever its classes and channels."""
    return next((v for v in VARIANTS if all(getattr(v, name) == sizes[name] for name in SHAPE)), None)


def variant_of(path: str | Path) -> str:
    """Return the name of the registry's variant whose shapes a safetensors file has.

    Raises:
        WeightsError: It has those of none; the text says what can be done with it.
    """
    shapes, named = read_shapes(path), repr(str(path))
    try:
        variant = matching_variant(recognise(shapes, named))
    except WeightsError as error:
        advice = _advice(path)
        raise (WeightsError(f"{error}. {advice}") if advice else error) from None
    if variant is None:
        raise WeightsError(f"{named} is of no variant. {_advice(path)}")
    return variant.name


def _advice(path: str | Path) -> str:
    """Say what to do with a safetensors file that does not fit a model, or "" if it is not a ConvMixer's."""
    command = f"convmixer convert {shlex.quote(str(path))}"
    shapes = read_shapes(path)
    if any(key.startswith("backbone.model.stem.") for key in shapes):
        return (
            "It has the weights of a FeaturePyramid: build one with the same arguments, without checkpoint, and call "
            "convmixer.load_checkpoint(model, file)"
        )
    try:
        ours = our_names(shapes, "")
        sizes = recognise(ours, "")
    except WeightsError:
        return ""
    variant = matching_variant(sizes)
    if variant is None:
        listed = ", ".join(f"{name}={sizes[name]}" for name in SHAPE)
        return (
            f"It has {listed}, which no variant of the registry has: {command} FOLDER writes a folder, which opens as "
            "local-dir:FOLDER"
        )
    counters = {f"{k.removesuffix('running_mean')}num_batches_tracked" for k in ours if k.endswith(".running_mean")}
    if ours.keys() != shapes.keys() or not counters <= ours.keys():
        return f"It is a {variant.name} as another program writes it. Convert it once: {command} NEW.safetensors"
    return f"It has the sizes of {variant.name}"


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle, by its start or its name; raise a WeightsError if it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    # A pickle names its protocol, 2 to 5, and goes on; a safetensors header's length ends in zero bytes.
    protocol = len(start) == 4 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:] != b"\0\0"
    return protocol or start == b"PK\x03\x04" or path.suffix in PICKLES


def check_keys(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    *,
    may_differ: tuple[str, ...] = (),
    path: str | Path | None = None,
) -> None:
    """Raise WeightsError unless `tensors` has the keys and shapes of `expected`.

    Args:
        tensors: From a file.
        expected: A model's state dict.
        source: Named in the error.
        may_differ: Keys that may be missing or have another shape, because the caller adapts them.
        path: The safetensors file, for advice.
    """
    missing = [k for k in expected if k not in tensors and k not in may_differ]
    extra = [k for k in tensors if k not in expected and k not in may_differ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({first_keys(missing)})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({first_keys(extra)})")
    wrong = [
        f"{k} expected {tuple(expected[k].shape)}, found {brief(tuple(tensors[k].shape))}"
        for k in expected
        if k in tensors and k not in may_differ and tensors[k].shape != expected[k].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({'; '.join(wrong[:3])})")
    integers = [
        k for k in expected if k in tensors and expected[k].is_floating_point() > tensors[k].is_floating_point()
    ]
    if integers:
        problems.append(f"{len(integers)} of whole numbers ({first_keys(integers)})")
    if problems:
        advice = path and _advice(path)
        raise WeightsError(
            f"{source} does not fit this model: {', '.join(problems)}. {advice or 'Is it another variant?'}"
        )


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model whose keys and shapes it must match exactly.

    The file is checked as a whole first: an error leaves the model as it was. Class names and preprocessing in its
    header, as `train` and `export` write them, take the place of the model's.

    Args:
        model: A ConvMixer, or any module. Wrappers are looked into, as by `predict`.
        path: A .safetensors file.

    Raises:
        WeightsError: The file is missing, a pickle, corrupt, not finite, or does not fit the model.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8")
        >>> file = convmixer.model_info("convmixer_256_8.cifar10").weights[0].path
        >>> convmixer.load_checkpoint(model, file)
    """
    model = unwrap(model)
    tensors, header = read_tensors(path), read_header(path)
    check_keys(tensors, model.state_dict(), str(path), path=path)
    model.load_state_dict(tensors)
    config: Any = getattr(model, "pretrained_cfg", None)
    names, outputs = header.get("label_names", ()), count_outputs(model)
    if config and names and len(names) in (outputs, 2 if outputs == 1 else outputs):
        config = {**config, **UNNAMED, "tag": None, "label_names": names}
    if config:
        model.pretrained_cfg = config | prepared_as(header, config.get("input_size"))
