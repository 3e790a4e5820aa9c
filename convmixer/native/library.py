"""The library of this package's own kernels for x86 CPUs: `csrc/`, compiled once for the machine, and loaded.

The library is compiled with the C++ compiler at hand, when it is first needed, and kept in `$XDG_CACHE_HOME/convmixer`
(`~/.cache/convmixer`) under a name made of source, compiler and processor, with a checksum. A damaged one is compiled
again; where nothing can be kept or run from there, it is compiled only for this process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from convmixer.errors import DependencyError
from convmixer.files import write_atomically
from convmixer.hardware import cpu_field, cpu_name
from convmixer.native.compiled_code import instead_of, unusable

_FOLDER = Path(__file__).parent / "csrc"
SOURCES = [_FOLDER / name for name in ("cpu.cpp", "cpu.h", "cpu_tiles.h", "cpu_bytes.h")]  # the first one is compiled
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SUM_SIZE = 32
_COMPILING = threading.Lock()
_INSTALL = {
    "linux": "install g++, or name a compiler in CXX",
    "darwin": "install clang by xcode-select --install, or name a compiler in CXX",
    "win32": "install Visual Studio's C++ build tools, and start Python from their command prompt",
}


def _after_fork() -> None:
    """Renew the lock in a forked child, whose one thread cannot wait for what compiled in the parent."""
    global _COMPILING
    _COMPILING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compiler() -> str | None:
    """Return the path of the C++ compiler: CXX, else g++ or clang++; None if there is none."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def lacks() -> str | None:
    """Say what the native kernels need and do not find, and what to do; None if nothing."""
    if sys.platform != "linux":  # they ask for tiles and large pages by Linux's calls
        return f"native needs Linux, and this is {sys.platform}: choose another backend, such as openvino"
    if compiler() is None:
        return f"native needs a C++ compiler on a CPU, and {_no_compiler()}: install g++ or clang++, or name one in CXX"
    return None


def _no_compiler() -> str:
    """Say why `compiler` has found none."""
    named = os.environ.get("CXX")
    return "there is none" if named is None else f"CXX={named!r} is not the name or the path of a program"


def inductor_lacks(device: torch.device) -> str | None:
    """Say what `torch.compile` needs on a device and does not find, and how to get it; None if nothing."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # which will call another one than `compiler` may find

        try:
            found = get_cpp_compiler() if "CXX" not in os.environ else compiler()
        except Exception:
            found = None
        if not found:
            advice = _INSTALL.get(sys.platform, _INSTALL["linux"])
            return f"needs a C++ compiler on a CPU, and {_no_compiler()}: {advice}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "needs triton on a GPU, which is missing: pip install triton"
    return None


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Return the compiled kernels; raise a DependencyError if they cannot be compiled, or kept and run nowhere."""
    loaded = load(SOURCES)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name in ("float32", "bfloat16", "int8"):
        function = getattr(loaded, f"convmixer_{name}", None)
        if function is None:  # this processor has no int8 tiles
            continue
        function.argtypes = [pointer, pointer, number, number, number, pointer, number, number]
        function.restype = number
    return loaded


def load(sources: Sequence[Path]) -> ctypes.CDLL:
    """Load the library of a C++ file; the further files are those that it includes.

    Raises:
        DependencyError: It can be compiled or kept nowhere.
    """
    with _COMPILING:
        return _find(sources)


def check_records(kernels: ctypes.CDLL, records: Sequence[type[ctypes.Structure]]) -> None:
    """Raise a RuntimeError where a record does not have the size that it has in C++."""
    expected = list((ctypes.c_int32 * len(records)).in_dll(kernels, "convmixer_record_sizes"))
    found = [ctypes.sizeof(record) for record in records]
    if found != expected:
        names = ", ".join(record.__name__ for record in records)
        raise RuntimeError(f"{names} have {found} bytes in Python, {expected} in csrc/: declare the same fields")


def _find(sources: Sequence[Path]) -> ctypes.CDLL:
    """Take a library from the cache, else compile it and put it there, else compile it only for this process."""
    if reason := lacks():
        raise DependencyError(reason)
    path = compiler() or ""
    if not torch.cpu._is_avx512_supported():
        raise DependencyError("native needs a CPU with AVX-512: choose another backend, such as openvino")
    texts = [source.read_text(encoding="utf-8") for source in sources]
    content = "\n".join([*texts, _run(path, "--version").stdout, cpu_name(), cpu_field("flags"), *FLAGS])
    name = f"native-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    binary = None
    try:
        file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convmixer" / name
        binary = _read(file)
        if binary is not None:
            return ctypes.CDLL(str(file))
        reason = unusable(file.parent)
        if reason is None:
            binary = _compile(path, sources[0])
            return _put(binary, file)
    except (OSError, RuntimeError) as error:  # nothing can be read, written or run there; no home
        reason = str(error)
    return _put(binary or _compile(path, sources[0]), instead_of(reason, "native kernels", "XDG_CACHE_HOME") / name)


def _put(binary: bytes, file: Path) -> ctypes.CDLL:
    write_atomically(file, lambda temporary: temporary.write_bytes(binary))
    return ctypes.CDLL(str(file))


def _run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DependencyError(f"{path} cannot be run ({error.strerror}): name another compiler in CXX") from error


def _read(file: Path) -> bytes | None:
    """Read a library and the checksum behind it, where a linker does not look; None if it is missing or damaged."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    return content if _sum(content[:-_SUM_SIZE]) == content[-_SUM_SIZE:] else None


def _sum(binary: bytes) -> bytes:
    return hashlib.sha256(binary).digest()


def _compile(path: str, source: Path) -> bytes:
    """Compile a library, in the form that `_read` takes."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "native.so"
        run = _run(path, *FLAGS, "-o", str(made), str(source))
        if run.returncode or not made.exists():
            lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise DependencyError(
                f"{path} cannot compile the native kernels ({lines[0] if lines else 'no message'}): "
                "name another compiler in CXX, or choose another backend"
            )
        binary = made.read_bytes()
    return binary + _sum(binary)
