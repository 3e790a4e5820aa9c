"""Where Python has no fork, no affinity and no signals of threads, as on Windows, and where the kernels cannot run."""

import errno
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, write_digits
from processes import finish

from convmixer import hardware
from convmixer.data import stream, workers
from convmixer.data.memory import Fit
from convmixer.errors import DependencyError, WriteError
from convmixer.files import write_atomically
from convmixer.native import compiled_code, library
from convmixer.runtime.choose import find_backend
from convmixer.training import get_recipe

# What Python lacks on Windows, by the modules of this package that could ask for it, is taken away before convmixer is
# imported; other libraries are imported before.
ELSEWHERE = """
import mmap, os, signal, sys
import accelerate, PIL.Image, huggingface_hub, psutil, rich.console, safetensors.torch, timm
import torch, torchvision.transforms.v2
import torch._dynamo, torch._inductor.async_compile
try:
    import openvino
except ImportError:
    pass

platform, cat, scratch = sys.argv[1:]
for module, names in {
    os: ("fork", "register_at_fork", "sched_getaffinity", "sysconf", "getuid", "killpg"),
    signal: ("pthread_kill", "pthread_sigmask", "SIGALRM", "SIGKILL", "SIGUSR1", "SIGHUP"),
    mmap: ("PROT_EXEC", "MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE"),
}.items():
    for name in names if platform == "win32" else ("sched_getaffinity",):
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp") if platform == "win32" else ():
    sys.modules[name] = None
sys.platform = platform

import convmixer
from convmixer.data.workers import default_workers
from convmixer.errors import DependencyError
from convmixer.native import training
from convmixer.runtime.choose import available_backends
from convmixer.training.signals import stop_signals

model = convmixer.create_model("convmixer_128_8_ks7_p2", pretrained=True, device="cpu").eval()
print(convmixer.predict(model, cat, topk=1)[0][0])
print("native" in available_backends("cpu"), training.lacking())
for backend in ("native", "eager"):
    try:
        print(type(convmixer.optimize(model, backend=backend)).__name__)
    except DependencyError as error:
        print(error)
print(default_workers() == os.cpu_count())
folder = convmixer.save_pretrained(model, os.path.join(scratch, "a folder"), licence="mit")
print(convmixer.create_model(f"local-dir:{folder}", pretrained=True, device="cpu").num_classes)
with stop_signals() as stopped:
    signal.raise_signal(signal.SIGINT)
    print(stopped() == signal.SIGINT)
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
@pytest.mark.slow
def test_elsewhere(platform, cat, tmp_path):
    done = finish([sys.executable, "-c", ELSEWHERE, platform, cat, tmp_path])
    assert done.returncode == 0, done.stderr
    reason = f"native needs Linux, and this is {platform}: choose another backend, such as openvino"
    assert done.stdout.splitlines() == ["cat", f"False {reason}", reason, "FoldedConvMixer", "True", "10", "True"]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_the_kernels_are_refused(monkeypatch, platform):
    monkeypatch.setattr(library.sys, "platform", platform)
    assert f"native needs Linux, and this is {platform}" in find_backend("native").missing()
    with pytest.raises(DependencyError, match=f"native needs Linux, and this is {platform}: choose another backend"):
        library.load(library.SOURCES)


@pytest.mark.parametrize(
    ("platform", "text"),
    [("linux", "install g++, or"), ("darwin", "install clang by xcode-select --install"), ("win32", "Visual Studio")],
)
def test_the_compiler_to_install(monkeypatch, platform, text):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(library.sys, "platform", platform)
    assert text in library.inductor_lacks(torch.device("cpu"))


def test_only_linux_is_asked_whether_bytes_may_run(monkeypatch, tmp_path):
    """macOS runs what is signed, and a file of zeros is not."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(compiled_code.mmap, "mmap", refuse)
    assert (compiled_code.unusable(tmp_path) is not None) == (sys.platform == "linux")
    monkeypatch.setattr(compiled_code.sys, "platform", "darwin")
    assert compiled_code.unusable(tmp_path) is None


def test_cores(monkeypatch):
    if hasattr(hardware.os, "sched_getaffinity"):
        assert hardware.usable_cores() == len(hardware.os.sched_getaffinity(0))
    monkeypatch.delattr(hardware.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 6)
    assert hardware.usable_cores() == 6
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: None)
    assert hardware.usable_cores() == 1


def test_a_file_that_is_open_is_not_replaced_on_windows(monkeypatch, tmp_path):
    """The error is that of the replacement, also if the temporary file cannot be removed either."""
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Access is denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", denied)
        patch.setattr(Path, "unlink", denied)
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(
            WriteError,
            match=r"weights.safetensors': Access is denied\. The file that was there is unchanged: this or another ",
        ):
            write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_reads_images_can_be_sent_to_another_process(kind, tmp_path, monkeypatch):
    """Without fork, workers of a stream get it as a pickle; they read the same images."""
    import tarfile

    source = write_digits(tmp_path / "digits", 12, 4, ("a", "b"))
    if kind == "tar":
        with tarfile.open(tmp_path / "digits.tar", "w") as archive:
            archive.add(source, ".")
        source = tmp_path / "digits.tar"
    given, batches = [], []

    class Loader:
        def __init__(self, dataset, *, worker_init_fn, collate_fn, batch_sampler, **_):
            again, init, collate = pickle.loads(pickle.dumps((dataset, worker_init_fn, collate_fn)))
            given.append(init)
            for keys in batch_sampler:
                mine, sent = collate_fn([dataset[key] for key in keys]), collate([again[key] for key in keys])
                assert torch.equal(mine[0], sent[0])
                assert len(mine[0])
                given.append(mine[1])
                batches.append(mine)

        def __iter__(self):
            return iter(batches)

    monkeypatch.setattr(workers, "DataLoader", Loader)
    recipe = get_recipe("cifar10", epochs=1, batch_size=4, stream=True, **SMALL_MODEL)
    opened = stream.open_stream(source, "train", recipe, Fit((3, 8, 8)), mean=(0.5,) * 3, workers=2, report=str)
    assert len(list(opened.in_order(4))) == 3
    assert len(given) == 4
