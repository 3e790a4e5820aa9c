"""What the machine computes fast: types, tiles, and the size of its cache."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import torch


def cpu_field(name: str) -> str:
    """Return what Linux says of the first processor, such as its "model name" or "flags"; "" on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def usable_cores() -> int:
    """Return how many processor cores this process may use: all of the machine's where the system sets no limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, as far as the system knows it."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def bf16_is_faster(device: torch.device) -> bool:
    """Return whether bfloat16 is faster: a GPU or a CPU (AVX512-BF16, AMX) that multiplies matrices of it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def has_tiles() -> bool:
    """Return whether the CPU multiplies tiles of bfloat16: AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_int8_tiles() -> bool:
    """Return whether the CPU multiplies tiles of int8 and permutes single bytes: AMX and AVX512-VBMI."""
    return {"amx_int8", "avx512vbmi"} <= set(cpu_field("flags").split())


@functools.lru_cache
def l2_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the bytes of a core's second-level cache: what Linux says, elsewhere 1 MiB, which is common."""
    try:
        for index in sorted(folder.glob("index*")):
            size = re.fullmatch(r"(\d+)([KM]?)", (index / "size").read_text().strip())
            if (index / "level").read_text().strip() == "2" and size:
                return int(size[1]) * {"": 1, "K": 2**10, "M": 2**20}[size[2]]
    except OSError:
        pass
    return 2**20
