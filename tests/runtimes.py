"""What tests of optimized models share: a small trained-looking model, and where the native kernels run."""

import torch
from conftest import vary_norms

import convmixer
from convmixer.runtime.choose import available_backends

SMALL = {"dim": 64, "depth": 2, "kernel_size": 5, "patch_size": 2, "num_classes": 7}
NO_NATIVE = "no C++ compiler, or no AVX-512"
HAS_NATIVE = "native" in available_backends("cpu")
HAS_NATIVE_INT8 = "native" in available_backends("cpu", torch.int8)


def make(**changes):
    """With statistics and scales that training could have left."""
    model = convmixer.ConvMixer(**{**SMALL, **changes}).eval()
    vary_norms(model, std=0.5, variance=(0.5, 2), scale=(0.5, 1.5))
    return model


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())
