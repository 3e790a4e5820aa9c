"""Folders for code that is compiled here: they take files, and the system runs what lies in them."""

from __future__ import annotations

import atexit
import functools
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from convmixer.errors import DependencyError

_LOGGER = logging.getLogger(__name__)


def unusable(folder: Path) -> str | None:
    """Why code cannot be kept in a folder and run from there, such as a read-only home; None where it can.

    The folder is made if need be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            if hasattr(mmap, "PROT_EXEC"):
                executable = mmap.PROT_READ | mmap.PROT_EXEC
                mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, executable).close()
    except OSError as error:
        return f"{str(folder)!r}: {error.strerror or error}"
    return None


@functools.lru_cache(maxsize=1)
def private_folder() -> Path:
    """A folder for this process, which goes with it; an OSError where even that cannot be had."""
    folder = Path(tempfile.mkdtemp(prefix="convmixer-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not a child by fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def instead_of(reason: str, what: str, variable: str) -> Path:
    """The private folder, in place of one that cannot be used.

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
    _LOGGER.warning("%s are compiled for this process alone, as %s; %s names another folder", what, reason, variable)
    return folder


def settle(variable: str, usual: Callable[[], str], what: str) -> None:
    """See to it that an environment variable names a usable folder: the private one if the usual one is not.

    Args:
        variable: By which the compiler finds its cache.
        usual: Where its cache is if the variable is not set.
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
