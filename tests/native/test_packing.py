"""What Python hands to the kernels."""

import ctypes

import pytest

from convmixer.native import packing, training
from convmixer.native.library import check_records, library
from convmixer.runtime.choose import available_backends


@pytest.mark.skipif("native" not in available_backends("cpu"), reason="no C++ compiler, or no AVX-512")
def test_records_that_differ_from_those_in_cpp():
    """The kernels would read numbers as addresses."""

    class Longer(ctypes.Structure):
        _fields_ = (*packing.BlockRecord._fields_, ("more", ctypes.c_void_p))

    check_records(library(), packing.RECORDS)
    check_records(training.kernels(), training.RECORDS)
    with pytest.raises(RuntimeError, match=r"Longer, .* have \[24, 96, 80\] bytes in Python, \[24, 88, 80\] in csrc/"):
        check_records(library(), (packing.AffineRecord, Longer, packing.ModelRecord))
