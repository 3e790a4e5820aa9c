"""A process that has used OpenVINO outlives signals, in whatever order its models come and go."""

import signal
import sys

import pytest
from processes import finish

from convmixer.runtime import openvino_core

pytest.importorskip("openvino")

PROGRAM = """
import ctypes, gc, os, pathlib, signal, sys, tempfile, threading
import torch
import convmixer
from convmixer.runtime import openvino, openvino_core
from convmixer.runtime.convert import to_openvino
from convmixer.runtime.folding import fold
from convmixer.runtime.quantize import quantize


class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def alternate():
    # The alternate signal stack of this thread, if it has one.
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.address


before, models, x = alternate(), {}, torch.rand(4, 3, 8, 8)
original = convmixer.ConvMixer(64, 1, 3, 2, num_classes=2).eval()


def make(name, **options):
    models[name] = convmixer.optimize(original, backend="openvino", **options)
    models[name](x)


def work(step):
    if step.startswith("-"):
        del models[step[1:]]
    elif step == "int8":
        make("int8", dtype=torch.int8, calibration=x)
    elif step == "quantized":
        quantize(to_openvino(fold(original, divide=False)), x)
    elif step == "export":
        with tempfile.TemporaryDirectory() as folder:
            convmixer.export_model(original, pathlib.Path(folder) / "m.xml", image_size=8)
    elif step == "types":
        openvino._processor_types.__wrapped__()
    elif step == "aside":
        thread = threading.Thread(target=make, args=("c",))
        thread.start()
        thread.join()
    else:
        make(step)


for step in sys.argv[1].split():
    work(step)
    gc.collect()
    assert alternate() == before, f"{step} has left its signal stack"
models.clear()
gc.collect()
assert alternate() == before
signal.signal(signal.SIGCHLD, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGCHLD)
print("alive")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks of Linux")
@pytest.mark.parametrize(
    "steps",
    [
        "a b -a -b",
        pytest.param("a b -b -a", marks=pytest.mark.slow),
        pytest.param("types a export -a b aside -b -c", marks=pytest.mark.slow),
        pytest.param("int8 a quantized -int8 export -a quantized", marks=pytest.mark.slow, id="nncf"),
    ],
)
def test_signals_after_models_have_gone(steps):
    if "int8" in steps:
        pytest.importorskip("nncf")
    done = finish([sys.executable, "-W", "ignore", "-c", PROGRAM, steps], timeout=900)
    assert (done.returncode, done.stdout) == (0, "handled\nalive\n"), done.stderr[-2000:]


def test_one_core():
    assert openvino_core.core() is openvino_core.core()


def test_work_aside():
    """It takes no signals, and hands on what it raises."""
    blocked = openvino_core.aside(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    assert signal.SIGCHLD in blocked
    assert signal.SIGSEGV not in blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(KeyError, match="handed on"):
        openvino_core.aside(lambda: {}["handed on"])
