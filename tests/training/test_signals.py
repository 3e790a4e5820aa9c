"""Trainings that are stopped while they compile, in processes of their own."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from processes import alive, started, wait_for

from convmixer.training import signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
TORCH = tuple(map(int, version("torch").split(".")[:2]))

TRAIN = """
import sys
from convmixer.errors import TrainingStopped
from convmixer.training import get_recipe, run, train
run.plot_history, run.write_figure = lambda _: None, lambda _, path: path.touch()
data, folder, epochs = sys.argv[1:]
recipe = get_recipe("cifar10", epochs=int(epochs), batch_size=2, rand_augment=(0, 0), model="convmixer_128_8_ks7_p2")
recipe = recipe.override(model_args=(("depth", 1), ("dim", 4)), input_size=(8, 8), validation_fraction=0.0)
try:
    train(recipe, data, folder, device="cpu", precision="float32", compile=epochs != "1", resume=epochs != "1")
except TrainingStopped as stop:
    print(stop)
    sys.exit(128 + stop.signal)
"""


@pytest.fixture
def pictures(cat, tmp_path) -> Path:
    for name in ("a", "b"):
        folder = tmp_path / "pictures" / "train" / name
        folder.mkdir(parents=True)
        for i in range(4):
            shutil.copy(cat, folder / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def endless(tmp_path) -> Path:
    """A C++ compiler that never comes to an end."""
    script = tmp_path / "endless"
    script.write_text('#!/bin/sh\ncase "$*" in *-version*) exec g++ "$@";; esac\ntouch "$0.called"\nsleep 600\n')
    script.chmod(0o755)
    return script


def test_a_process_started_while_its_parent_is_suspended(monkeypatch):
    """It is suspended, too: when the parent is killed, nothing would find it any more."""
    with started(["sleep", "600"]) as parent, started(["sleep", "600"]) as child:
        both = {process.pid: psutil.Process(process.pid) for process in (parent, child)}
        views = [{parent.pid: both[parent.pid]}, both, both]
        monkeypatch.setattr(signals, "_descendants", lambda: views.pop(0))
        stop = signals._Stop()
        stop.running, stop.number = 1, signal.SIGTERM
        with pytest.raises(signals.StoppedWhileCompilingError):
            stop._obey()
        assert stop.halted == both


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow, id="SIGTERM to the group"),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
    ],
)
def test_stopped_while_compiling(tmp_path, pictures, endless, number, group):
    command = [sys.executable, "-c", TRAIN, pictures, tmp_path / "run"]
    env = os.environ | {"CXX": str(endless), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cold")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": env, "start_new_session": True}
    with started([*command, 1], **options) as process:  # an epoch without the compiler
        assert process.wait(240) == 0, process.communicate()[0]
    state = hashlib.sha256((tmp_path / "run" / "last.pt").read_bytes()).hexdigest()
    with started([*command, 2], **options) as process:
        wait_for(process, Path(f"{endless}.called"))
        begun = time.monotonic()
        os.killpg(process.pid, number) if group else process.send_signal(number)
        output = process.communicate(timeout=240)[0]
        print(f"ended after {time.monotonic() - begun:.1f} s")
        assert process.returncode == 128 + number, output
        assert "stopped while compiling; what was saved before is kept: go on with --resume" in output
        if number == signal.SIGTERM or TORCH >= (2, 8):  # a helper of 2.7 prints that it was interrupted
            assert "Traceback" not in output
        assert [" ".join(one.info["cmdline"]) for one in alive(process)] == []
    assert hashlib.sha256((tmp_path / "run" / "last.pt").read_bytes()).hexdigest() == state


STUCK = """
import ctypes, time, torch
from convmixer.training import signals
signals.PATIENCE, signals.LIMIT = 0.3, 2.0
class Deaf:
    def __del__(self):  # exceptions raised here are lost
        print("ready", flush=True)
        time.sleep(600)
try:
    with signals.stop_signals():
        for callback in torch._dynamo.callback_handler.start_callbacks:
            callback()
        if {inside}:
            mutex = ctypes.create_string_buffer(64)
            print("ready", flush=True)
            while True:  # the second one never returns, as C++ code that does not look for signals
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        deaf = Deaf()
        del deaf
        time.sleep(600)
except signals.StoppedWhileCompilingError as stop:
    print("noticed", stop.number)
"""


@pytest.mark.parametrize(
    "inside",
    [
        pytest.param(True, id="in C++"),
        pytest.param(False, marks=pytest.mark.slow, id="where exceptions are lost"),
    ],
)
def test_a_compilation_that_does_not_notice(inside):
    command = [sys.executable, "-W", "ignore", "-c", STUCK.replace("{inside}", str(inside))]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=240)
    if inside:
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped while compiling, which could not be interrupted; what was saved before is intact" in errors
    else:
        assert (process.returncode, output) == (0, f"noticed {signal.SIGTERM}\n"), errors


def test_other_handlers_come_back():
    from convmixer.training.signals import stop_signals

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    with stop_signals() as stopped:
        assert stopped() == 0
        signal.raise_signal(signal.SIGTERM)
        assert stopped() == signal.SIGTERM
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1))
