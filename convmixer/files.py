"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from convmixer.errors import ArgumentError, ConvMixerError, WriteError


def check_writable(path: str | Path) -> None:
    """Raise what `write_atomically` would raise for a path, before its content is computed.

    Raises:
        ArgumentError: `path` is a folder, or its folder does not exist.
        WriteError: Its folder takes no files.
    """
    _temporary(Path(os.path.expanduser(path))).unlink()


def _temporary(path: Path) -> Path:
    """Make an empty file next to the path that is to be written."""
    if os.path.isdir(path):
        raise ArgumentError(f"cannot write {str(path)!r}: it is a folder")
    if not os.path.isdir(path.parent):
        raise ArgumentError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise WriteError(
            f"cannot write {path.name!r} in the folder {str(path.parent)!r}: {error.strerror}. Choose another"
        ) from error
    os.close(handle)
    return Path(name)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it: `path` always is the old file or the new one.

    Raises:
        ArgumentError: `path` is a folder, or its folder does not exist.
        WriteError: The folder takes no files, or the disk is full.
    """
    path = Path(os.path.expanduser(path))
    temporary = _temporary(path)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from other users
        temporary.replace(path)
    except ConvMixerError:
        raise
    except OSError as error:
        # Windows does not replace an open file, and a model keeps the file of its weights open.
        advice = (
            ": this or another program has it open"
            if sys.platform == "win32" and isinstance(error, PermissionError)
            else ""
        )
        raise WriteError(
            f"cannot write {str(path)!r}: {error.strerror or error}. The file that was there is unchanged{advice}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # which would hide what went wrong before
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files of `write_atomically` in a folder, which it leaves behind when it is killed.

    Args:
        folder: The folder of the files that it was to write.
        names: Pattern of their names, as for `Path.glob`. Nothing else in the folder is touched.
    """
    for leftover in folder.glob(f".{names}.{'[a-z0-9_]' * 8}"):  # as mkstemp names them
        leftover.unlink(missing_ok=True)
