"""Compiled code where nothing can be kept, or what was kept is damaged."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import finish

import convmixer
from convmixer.errors import DependencyError
from convmixer.native import compiled_code
from convmixer.native import library as native
from convmixer.runtime import choose
from convmixer.runtime.choose import available_backends, find_backend

HAS_NATIVE = "native" in available_backends("cpu")
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no C++ compiler, or no AVX-512")
needs_compile = pytest.mark.skipif(find_backend("compile").missing() is not None, reason="no C++ compiler")

PROGRAM = """
import sys
import torch
import convmixer
from convmixer.runtime import choose
from convmixer.native import library as native

torch.manual_seed(0)
model = convmixer.ConvMixer(64, 1, 3, 2, num_classes=3).eval()
if "auto" in sys.argv:
    choose.available_backends = lambda *_: ("compile", "eager")
fast = convmixer.optimize(model, backend=sys.argv[1])
x = torch.randn(2, 3, 8, 8)
with torch.no_grad():
    assert torch.allclose(fast(x), model(x), atol=1e-5)
print(fast.choice)
"""


def program(backend, **env):
    """Run it; a variable that is None is unset."""
    given = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, backend]
    return finish(words, env={name: str(value) for name, value in given.items()}, timeout=900)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    compiled_code.private_folder.cache_clear()
    yield tmp_path / "convmixer"
    native.library.cache_clear()


@pytest.fixture
def noexec(tmp_path):
    """A folder on a file system from which nothing may be run."""
    folder = tmp_path / "noexec"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this user cannot mount file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def compiled():
    """The library as it lies in the cache, compiled if need be."""
    if not HAS_NATIVE:
        pytest.skip("no C++ compiler, or no AVX-512")
    return Path(native.library()._name).read_bytes()


@pytest.fixture(scope="module")
def copying(compiled, tmp_path_factory):
    """A compiler that takes no time: it has the result at hand."""
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "native.so").write_bytes(compiled[:-32])
    script = folder / "cxx"
    script.write_text(f"""#!/bin/sh
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then cp {folder}/native.so "$2"; fi; shift; done
""")
    script.chmod(0o755)
    return script


# ---- damage ---------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "foreign"])
def test_a_damaged_library_is_compiled_again(fresh, compiled, monkeypatch, damage):
    calls = []
    monkeypatch.setattr(native, "_compile", lambda path: calls.append(path) or compiled)
    native.library()
    (file,) = fresh.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.unlink()  # it is mapped by this process
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "one bit": flipped, "foreign": b"\x7fELF"}[damage])
    native.library.cache_clear()
    assert native.library().convmixer_amx() in (0, 1)
    assert file.read_bytes() == whole
    assert len(calls) == 2
    native.library.cache_clear()
    native.library()
    assert len(calls) == 2
    assert list(fresh.iterdir()) == [file]


@needs_native
def test_a_process_survives_a_library_cut_in_half(copying, tmp_path):
    """As a power loss leaves it; the system ends a process that touches pages beyond the end of a file."""
    for _ in range(2):
        done = program("native", XDG_CACHE_HOME=tmp_path, CXX=copying)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("native")
        (file,) = (tmp_path / "convmixer").iterdir()
        os.truncate(file, file.stat().st_size // 2)


@needs_native
@pytest.mark.slow
def test_five_processes_at_once(copying, compiled, tmp_path):
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda _: program("native", XDG_CACHE_HOME=tmp_path, CXX=copying), range(5)))
    assert [done.returncode for done in found] == [0] * 5, [done.stderr for done in found]
    (file,) = (tmp_path / "convmixer").iterdir()
    assert file.read_bytes() == compiled


# ---- caches that cannot be used -------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("place", ["a file", "read-only", "no home", "not executable"])
def test_native_without_a_cache(fresh, compiled, monkeypatch, tmp_path, caplog, request, place):
    """The kernels are compiled only for this process."""
    monkeypatch.setattr(native, "_compile", lambda _: compiled)
    if place == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif place == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # for root, too
    elif place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", _raising(RuntimeError("Could not determine home directory.")))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(request.getfixturevalue("noexec")))
    with caplog.at_level(logging.WARNING):
        native.library()
    assert "native kernels are compiled only for this process, as" in caplog.text
    assert "XDG_CACHE_HOME names another folder" in caplog.text
    kept = list(compiled_code.private_folder().iterdir())
    assert [file.suffix for file in kept] == [".so"]
    assert compiled_code.private_folder().stat().st_mode & 0o777 == 0o700


def _raising(error):
    def fail(*_):
        raise error

    return fail


@needs_native
def test_a_library_that_cannot_be_loaded_from_its_cache(fresh, compiled, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda _: compiled)
    load = native.ctypes.CDLL

    def refuse(path):
        if str(fresh) in path:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    for _ in range(2):  # just compiled, and found
        native.library()
        native.library.cache_clear()


@needs_native
def test_nowhere(fresh, compiled, monkeypatch):
    """`auto` goes on, and says why; what was asked for is an error that says what to set."""
    monkeypatch.setattr(native, "_compile", lambda _: compiled)
    monkeypatch.setattr(compiled_code, "unusable", lambda folder: f"{str(folder)!r}: Read-only file system")
    monkeypatch.setattr(native, "unusable", compiled_code.unusable)
    monkeypatch.setattr(choose, "available_backends", lambda *_: ("native", "eager"))
    model = convmixer.ConvMixer(64, 1, 3, 2, num_classes=3).eval()
    for example in (None, torch.randn(1, 3, 8, 8)):
        choice = convmixer.optimize(model, backend="auto", example=example).choice
        assert choice.backend == "eager"
        assert "can be kept and run nowhere" in choice.reason
        assert "set XDG_CACHE_HOME to a folder that takes files" in choice.reason
    with pytest.raises(DependencyError, match=r"Read-only file system; .*: set XDG_CACHE_HOME"):
        convmixer.optimize(model, backend="native")


@needs_native
def test_a_read_only_home(copying, tmp_path):
    """The whole way, in a process of its own."""
    (tmp_path / "home").touch()
    done = program("native", XDG_CACHE_HOME=None, HOME=tmp_path / "home", TMPDIR=tmp_path, CXX=copying)
    assert done.returncode == 0, done.stderr
    assert "compiled only for this process" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


@needs_compile
@pytest.mark.slow
def test_compile_without_a_cache(noexec, tmp_path):
    """Where nothing may be run; where no folder can be made, torchvision itself cannot be imported."""
    done = program("compile", TORCHINDUCTOR_CACHE_DIR=noexec, TMPDIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "graphs of TorchInductor are compiled only for this process" in done.stderr
    assert not list(tmp_path.glob("convmixer-*"))


@pytest.mark.skipif(shutil.which("false") is None, reason="no program that fails")
def test_auto_without_a_compiler_that_works(tmp_path):
    """What compiles at its first call is tried before it is taken."""
    done = program("auto", CXX="false", TORCHINDUCTOR_CACHE_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("eager")
    assert "TorchInductor cannot compile here" in done.stdout
    assert "backend='auto' goes on without compile" in done.stderr


def test_folders(tmp_path, noexec):
    assert compiled_code.unusable(tmp_path / "new" / "folder") is None
    (tmp_path / "file").touch()
    assert compiled_code.unusable(tmp_path / "file").endswith(": File exists")
    assert compiled_code.unusable(tmp_path / "file" / "below").endswith(": Not a directory")
    assert compiled_code.unusable(noexec).endswith(": Operation not permitted")


def test_a_setting_stays_where_it_can_be_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_CACHE", str(tmp_path))
    compiled_code.settle("SOME_CACHE", _raising(AssertionError()), "things")
    assert os.environ["SOME_CACHE"] == str(tmp_path)
    monkeypatch.delenv("SOME_CACHE")
    compiled_code.settle("SOME_CACHE", lambda: str(tmp_path), "things")
    assert "SOME_CACHE" not in os.environ
    compiled_code.settle("SOME_CACHE", _raising(RuntimeError("no home")), "things")
    assert os.environ.pop("SOME_CACHE") == str(compiled_code.private_folder())
