"""What is said of the processor, against what Linux says of it."""

import sys
from pathlib import Path

import pytest
import torch

from convmixer.hardware import bf16_is_faster, has_tiles

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux names the flags")
def test_bfloat16_pays_where_the_processor_multiplies_it():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    assert bf16_is_faster(CPU) == bool(flags & {"avx512_bf16", "amx_tile"})
    assert has_tiles() == ("amx_tile" in flags)
