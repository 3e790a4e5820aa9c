"""Tensors on disk: safetensors in and out, key remaps, and the checks before anything reaches a model."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convmixer.errors import ArgumentError, WeightsError, brief
from convmixer.model import ConvMixer, evaluating
from convmixer.registry import VARIANTS, Variant, get_variant
from convmixer.untrusted import header_excess

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: the old file or the new one."""
    path = Path(path)
    if path.is_dir():
        raise ArgumentError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir():
        raise ArgumentError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from other users
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content: the library puts metadata in a random order."""
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(length))  # the same characters in another order, so that the tensors stay in place


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file whose header was checked by its library; what is wrong with it becomes a WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {str(path)!r}: give the path of a .safetensors file")
    try:
        if excess := header_excess(path):
            raise WeightsError(f"{str(path)!r} has a header of {excess}: it holds no weights of a ConvMixer")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        if _is_pickle(path):
            raise WeightsError(
                f"{str(path)!r} is a pickle, which can run code when it is opened. Convert it once: "
                f"convmixer convert {shlex.quote(str(path))} {shlex.quote(path.name.split('.')[0])}.safetensors"
            ) from error
        raise WeightsError(
            f"{str(path)!r} is not a whole safetensors file ({path.stat().st_size} bytes): "
            f"{brief(str(error), 300)}. Fetch it again"
        ) from error


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, from its header alone."""
    with _opened(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from disk rather than copied; all of them finite.

    Raises:
        WeightsError: The file is missing, a pickle, cut short or corrupt, or holds values that are not finite.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    _check_finite(tensors, repr(str(path)))
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
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
    """The strings in the header of a safetensors file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


# ---- which model a file is ------------------------------------------------------------------------------------------


def recognise(shapes: Mapping[str, Sequence[int]], source: str) -> dict[str, int]:
    """The constructor's sizes that the shapes of a ConvMixer's tensors tell: dim, depth, ..., num_classes.

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
    raise WeightsError(f"{source} is no ConvMixer: its keys are {_first(list(shapes))}")


def find_variant(sizes: Mapping[str, int], source: str) -> Variant:
    """The registry's variant of these sizes, whatever its classes and channels.

    Raises:
        WeightsError: There is none.
    """
    shape = tuple(sizes[name] for name in _SHAPE)
    for variant in VARIANTS:
        if tuple(getattr(variant, name) for name in _SHAPE) == shape:
            return variant
    raise WeightsError(f"{source} has {', '.join(_SHAPE)} = {shape}, which no variant of the registry has")


_SHAPE = ("dim", "depth", "kernel_size", "patch_size")


def variant_of(path: str | Path) -> str:
    """Name of the registry's variant whose shapes a safetensors file has."""
    return find_variant(recognise(read_shapes(path), repr(str(path))), repr(str(path))).name


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    # A pickle names its protocol, 2 to 5, and goes on; a safetensors header's length ends in zero bytes.
    protocol = len(start) == 4 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:] != b"\0\0"
    return protocol or start == b"PK\x03\x04" or path.suffix in PICKLES


def check_keys(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str,
    *,
    may_differ: tuple[str, ...] = (),
) -> None:
    """Raise WeightsError unless `tensors` has the keys and shapes of `expected`.

    Args:
        tensors: From a file.
        expected: A model's state dict.
        source: Named in the error.
        may_differ: Keys that may be missing or have another shape, because the caller adapts them.
    """
    missing = [k for k in expected if k not in tensors and k not in may_differ]
    extra = [k for k in tensors if k not in expected and k not in may_differ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_first(missing)})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({_first(extra)})")
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
        problems.append(f"{len(integers)} of whole numbers ({_first(integers)})")
    if problems:
        raise WeightsError(f"{source} does not fit this model: {', '.join(problems)}. Is it another variant?")


def _first(keys: list[str]) -> str:
    return ", ".join(brief(key) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model whose keys and shapes it must match exactly.

    The file is checked as a whole first: an error leaves the model as it was.

    Args:
        model: A ConvMixer, or any module.
        path: A .safetensors file.

    Raises:
        WeightsError: The file is missing, a pickle, corrupt, not finite, or does not fit the model.
    """
    tensors = read_tensors(path)
    check_keys(tensors, model.state_dict(), str(path))
    model.load_state_dict(tensors)


# ---- conversion of old checkpoints ----------------------------------------------------------------------------------

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def _unwrap(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of the one ConvMixer in a checkpoint, without the prefix that all of them have."""
    for _ in range(4):
        nested = [k for k in _NESTED if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)]
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source} holds no state dict: found {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(f"{source} holds no tensors: its keys are {_first([str(k) for k in content])}")
    # Wrappers add a prefix, and there may be others' tensors beside it: of a loss, a metric, an average of the model.
    starts = (k.removesuffix(stem) for stem in ("stem.0.weight", "0.weight") for k in tensors if k.endswith(stem))
    found = [p for p in starts if f"{p}blocks.0.0.fn.0.weight" in tensors or f"{p}3.0.fn.0.weight" in tensors]
    averages = [p for p in found if re.search(r"(?:^|[._])ema[._]", p)]
    prefixes = averages or found
    if len(prefixes) > 1:
        raise WeightsError(
            f"{source} holds {len(prefixes)} models, with the prefixes {_first(prefixes)}: "
            "save a file of the state dict of one of them"
        )
    prefix = prefixes[0] if prefixes else ""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _rename_flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the paper's one flat Sequential (stem 0 to 2, blocks from 3, head last) to this package's."""
    if "0.weight" not in tensors or not all(re.fullmatch(r"[0-9]+\..+", k) for k in tensors):
        return tensors
    head = max(int(k.split(".")[0]) for k in tensors)

    def rename(key: str) -> str:
        number, rest = key.split(".", 1)
        index = int(number)
        if index == head:
            return f"head.{rest}"
        if index < 3:
            return f"stem.{key}"
        return f"blocks.{index - 3}.{rest}"

    return {rename(k): v for k, v in tensors.items()}


def convert_checkpoint(source: str | Path, destination: str | Path, *, variant: str | None = None) -> str:
    """Turn a pickled checkpoint into safetensors with this package's keys.

    Read are the paper's flat Sequential keys, timm's keys, state dicts nested under `state_dict`, `model` or an EMA's
    name, and the prefixes that wrappers such as DataParallel, `torch.compile` and Lightning add. Where a checkpoint has
    averaged weights, they are taken. The file is opened with `weights_only=True`: it cannot run code. What was written
    is read again and computed once before it is put in place.

    Args:
        source: A .pth, .pth.tar, .pt, .bin or .ckpt file.
        destination: The .safetensors file to write.
        variant: The variant that it must be; None takes the one that has the shapes of the tensors.

    Returns:
        The name of the variant.

    Raises:
        UnknownModelError: No such variant.
        WeightsError: The file cannot be read safely, or is no ConvMixer that the registry knows.
    """
    source = Path(source)
    asked = None if variant is None else get_variant(variant)[0]
    if not source.is_file():
        raise WeightsError(f"no checkpoint at {str(source)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script keeps its arguments so
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error class of its own
        # PyTorch's text goes on to explain how to run the code.
        found = re.search(r"Unsupported (global|class|operand)[^\n]*", str(error))
        reason = found[0] if found else type(error).__name__
        raise WeightsError(
            f"cannot read {str(source)!r} without running code from it: {reason}. "
            "Ask whoever wrote it for a file of the state dict alone"
        ) from error
    named = repr(str(source))
    tensors = _rename_flat(_unwrap(content, named))
    sizes = recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()}, named)
    if asked and any(sizes[name] != getattr(asked, name) for name in _SHAPE):
        wanted, has = ({name: get(name) for name in _SHAPE} for get in (lambda n: getattr(asked, n), sizes.get))
        raise WeightsError(f"{named} is no {asked.name}, which has {_listed(wanted)}: it has {_listed(has)}")
    match = asked or find_variant(sizes, named)
    arguments: dict[str, Any] = {**sizes, "act_layer": match.act_layer, "device": "meta"}
    model = ConvMixer(**arguments)
    check_keys(tensors, model.state_dict(), named)
    _check_finite(tensors, named)
    header = {"format": "pt", "architecture": match.name}
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}

    def write(path: Path) -> None:
        _write_tensors(tensors, path, header)
        written = read_tensors(path)
        model.load_state_dict({k: t.float() if t.is_floating_point() else t for k, t in written.items()})
        side = 2 * sizes["patch_size"]
        with torch.inference_mode(), evaluating(model):
            outputs = model(torch.zeros(1, sizes["in_chans"], side, side))
        if not outputs.isfinite().all():
            raise WeightsError(f"{named}: the model computes values that are not finite. Is it another variant?")

    write_atomically(destination, write)
    return match.name


def _listed(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())
