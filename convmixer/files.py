"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less what the umask takes
    except OSError as error:
        raise WriteError(
            f"cannot write {path.name!r} in the folder {str(path.parent)!r}: {error.strerror}. Choose another"
        ) from error
    os.close(handle)
    return temporary


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it: `path` always is the old file or the new one.

    Raises:
        ArgumentError: `path` is a folder, or its folder does not exist.
        WriteError: The folder takes no files, or the disk is full.
    """
    path = Path(os.path.expanduser(path))
    temporary = _temporary(path)
    mode = stat.S_IMODE(temporary.stat().st_mode)  # reading the umask itself would change it for all threads
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # `write` may have put another file there
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
    for leftover in folder.glob(f".{names}.{'[0-9a-f]' * 8}"):  # as `_temporary` names them
        leftover.unlink(missing_ok=True)
