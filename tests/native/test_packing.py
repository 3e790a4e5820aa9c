"""What Python hands to the kernels."""

import ctypes

import pytest

from convmixer.native import packing
from convmixer.native.library import library
from convmixer.runtime.choose import available_backends


@pytest.mark.skipif("native" not in available_backends("cpu"), reason="no C++ compiler, or no AVX-512")
def test_records_that_differ_from_those_in_cpp(monkeypatch):
    """Otherwise the kernels would read addresses that are none."""

    class Longer(ctypes.Structure):
        _fields_ = (*packing.BlockRecord._fields_, ("more", ctypes.c_void_p))

    packing.check_records(library())
    monkeypatch.setattr(packing, "_RECORDS", (packing.AffineRecord, Longer, packing.ModelRecord))
    with pytest.raises(
        RuntimeError, match=r"in packing.py have \[24, 96, 80\] bytes, in cpu.h \[24, 88, 80\]: declare"
    ):
        packing.check_records(library())
