"""Folders for code that is compiled on this machine: files can be written to them and run from them."""

from __future__ import annotations

import atexit
import functools
import logging
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from convmixer.errors import DependencyError

_LOGGER = logging.getLogger(__name__)


def unusable(folder: Path) -> str | None:
    """Say why code cannot be kept in a folder and run from there, such as a read-only home; None where it can.

    The folder is made if it does not exist.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            if sys.platform == "linux":  # elsewhere signatures decide what may run, and these bytes have none
                executable = mmap.PROT_READ | mmap.PROT_EXEC
                mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, executable).close()
    except OSError as error:
        return f"{str(folder)!r}: {error.strerror or error}"
    return None


@functools.lru_cache(maxsize=1)
def private_folder() -> Path:
    """Make a folder for this process, which is removed at its end; raise an OSError where even that is impossible."""
    folder = Path(tempfile.mkdtemp(prefix="convmixer-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def instead_of(reason: str, what: str, variable: str) -> Path:
    """Return the private folder, instead of one that cannot be used.

    Args:
        reason: From `unusable`.
        what: What is compiled, in words.
        variable: The environment variable that names the usual folder.

    Raises:
        DependencyError: That folder cannot be used either.
    """
    try:
        folder = private_folder()
        second = unusable(folder)
    except OSError as error:
        second = str(error)
    if second:
        raise DependencyError(
            f"{what} can be kept and run nowhere ({reason}; {second}): set {variable} to a folder that takes files and "
            "from which programs may be run, or choose another backend"
        )
    _LOGGER.warning("%s are compiled only for this process, as %s; %s names another folder", what, reason, variable)
    return folder


def settle(variable: str, usual: Callable[[], str], what: str) -> None:
    """Make an environment variable name a usable folder: the private one if the usual one is not usable.

    Args:
        variable: Names the compiler's cache.
        usual: Returns where the cache is if the variable is not set.
        what: What is compiled, in words.

    Raises:
        DependencyError: As `instead_of`.
    """
    try:
        reason = unusable(Path(os.environ.get(variable) or usual()))
    except (OSError, RuntimeError) as error:  # no home, no temporary folder
        reason = str(error)
    if reason:
        os.environ[variable] = str(instead_of(reason, what, variable))
