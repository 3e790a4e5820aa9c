"""How much JSON of a stranger is parsed: a parser may need a hundred bytes of memory for one byte of text."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

MAX_BYTES = 4 * 2**20  # class names and descriptions of ImageNet-22k are less than half of it
MAX_VALUES = 100_000  # of which those names take 44,000, and the header of a model of 1000 blocks 62,000
_HARMLESS = 2**16  # bytes


def json_excess(text: bytes) -> str:
    """Return what is too much in JSON that has not been parsed yet, or ""."""
    if len(text) > MAX_BYTES:
        return f"more than {MAX_BYTES:,} bytes of JSON"
    if len(text) > _HARMLESS:
        # A comma ends a value, unless it stands in a string. One by one, because a list of all would need memory.
        unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
        commas = (match for match in re.finditer(rb'"[^"]*"?|,', unescaped) if match[0] == b",")
        if next(islice(commas, MAX_VALUES - 1, None), None):
            return f"more than {MAX_VALUES:,} values of JSON"
    return ""


def header_excess(path: Path) -> str:
    """Return what is too much in the header of a safetensors file, or ""; its library checks whether it is one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= _HARMLESS or length > path.stat().st_size:
            return ""
        return json_excess(file.read(min(length, MAX_BYTES + 1)))
