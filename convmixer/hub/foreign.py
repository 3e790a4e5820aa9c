"""Checkpoints of other programs: where in them a ConvMixer is, and which name of this package each tensor has.

Nothing here opens a file. The functions that rename take any values by name, such as tensors or their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from convmixer.errors import WeightsError, brief, list_first

Value = TypeVar("Value")

# Under what training programs keep a state dict that is none of a ConvMixer, for a message.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "params")
# In a name, averages of the weights; "average" is that of a run's last.pt.
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|average)(?:[._]|$)")
_MOST_LEVELS = 5  # of mappings in one another


def find_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """Return the tensors of the one ConvMixer in what a checkpoint holds, by this package's names.

    Args:
        content: What was unpickled.
        source: Named in the error.

    Raises:
        WeightsError: There are no tensors, or more than one model.
    """
    distinct: dict[frozenset[tuple[str, int]], tuple[str, dict[str, Tensor]]] = {}
    for path, tensors in _convmixers(content):  # of two names of one state dict, one will do
        distinct.setdefault(frozenset((key, id(tensor)) for key, tensor in tensors.items()), (path, tensors))
    found = dict(distinct.values())
    averages = {path: tensors for path, tensors in found.items() if _AVERAGE.search(path)}
    chosen = averages or found
    if len(chosen) > 1:
        raise WeightsError(
            f"{source} holds {len(chosen)} models, under {first_keys(chosen)}: save a file of the state dict of one of "
            "them"
        )
    if chosen:
        return our_names(next(iter(chosen.values())), source)
    while isinstance(content, Mapping) and (nested := [k for k in _NESTED if isinstance(content.get(k), Mapping)]):
        content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source} holds no state dict: found {type(content).__name__}")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(f"{source} holds no tensors: its keys are {first_keys(map(str, content))}")
    return our_names(tensors, source)


def _convmixers(content: Any, path: str = "", levels: int = _MOST_LEVELS) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the keys that lead to each state dict of a ConvMixer in what a checkpoint holds, and its tensors."""
    if not isinstance(content, Mapping) or not levels:
        return
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if any(key.endswith("0.fn.0.weight") for key in tensors):
        yield path, tensors
    for key, value in content.items():
        yield from _convmixers(value, f"{path}.{key}".lstrip("."), levels - 1)


def our_names(values: Mapping[str, Value], source: str) -> dict[str, Value]:
    """Return the values of the one ConvMixer among them, by this package's names; all of them if there is none.

    Raises:
        WeightsError: There is more than one model.
    """
    return _rename_flat(_without_prefix(_rename_mmpretrain(values), source))


def first_keys(keys: Iterable[str]) -> str:
    """List the first three keys of a file, for a message."""
    return list_first(map(brief, keys), most=3)


def _rename_mmpretrain(values: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors of mmpretrain, which keeps stem and stages in a backbone, and the classifier in a head."""
    mark = "backbone.stages.0.0.fn.0.weight"
    prefix = next((k.removesuffix(mark) for k in values if k.endswith(mark)), None)
    if prefix is None:
        return dict(values)
    names = {"backbone.stem.": "stem.", "backbone.stages.": "blocks.", "head.fc.": "head."}

    def rename(key: str) -> str:
        for theirs, ours in names.items():
            if key.startswith(prefix + theirs):
                return prefix + ours + key.removeprefix(prefix + theirs)
        return key

    return {rename(key): value for key, value in values.items()}


def _without_prefix(values: dict[str, Value], source: str) -> dict[str, Value]:
    """Strip what wrappers put before names, and leave out tensors of others: a loss, a metric, another model."""
    starts = (k.removesuffix(stem) for stem in ("stem.0.weight", "0.weight") for k in values if k.endswith(stem))
    found = [p for p in starts if f"{p}blocks.0.0.fn.0.weight" in values or f"{p}3.0.fn.0.weight" in values]
    averages = [p for p in found if _AVERAGE.search(p)]
    prefixes = averages or found
    if len(prefixes) > 1:
        raise WeightsError(
            f"{source} holds {len(prefixes)} models, with the prefixes {first_keys(prefixes)}: "
            "save a file of the state dict of one of them"
        )
    prefix = prefixes[0] if prefixes else ""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _rename_flat(values: dict[str, Value]) -> dict[str, Value]:
    """Rename tensors of the paper's one flat Sequential: stem 0 to 2, blocks from 3, head last."""
    if "0.weight" not in values or not all(re.fullmatch(r"[0-9]+\..+", k) for k in values):
        return values
    head = max(int(k.split(".")[0]) for k in values)

    def rename(key: str) -> str:
        number, name = key.split(".", 1)
        index = int(number)
        if index == head:
            return f"head.{name}"
        if index < 3:
            return f"stem.{key}"
        return f"blocks.{index - 3}.{name}"

    return {rename(k): v for k, v in values.items()}
