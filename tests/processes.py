"""Programs that tests start; whatever happens, no process of theirs outlives the block."""

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

_MARK = "CONVMIXER_TEST_PROGRAM"


@contextlib.contextmanager
def started(command: Sequence[object], *, env: Mapping[str, str] = os.environ, **options) -> Iterator[subprocess.Popen]:
    """A running program; at the end of the block it is killed with all that it has started."""
    mark = uuid.uuid4().hex
    words = [str(word) for word in command]
    with subprocess.Popen(words, env={**env, _MARK: mark}, text=True, **options) as process:
        process.mark = mark
        try:
            yield process
        finally:
            for one in alive(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def alive(process: subprocess.Popen) -> Iterator[psutil.Process]:
    """A program of `started` and all that it has started, as far as they have not ended."""
    family = set()  # what has only just been started shows no environment yet
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            family = {own.pid, *(child.pid for child in own.children(recursive=True))}
    # Launchers give each of their processes a session of its own, so that the group would not hold them.
    for one in psutil.process_iter(["environ", "cmdline", "status"]):
        known = one.pid in family or (one.info["environ"] or {}).get(_MARK) == process.mark
        if known and one.info["status"] != psutil.STATUS_ZOMBIE:
            yield one


def wait_for(process: subprocess.Popen, file: Path, rows: int = -1, seconds: float = 240) -> None:
    """Until a running program has written a file of more than so many lines."""
    deadline = time.monotonic() + seconds
    while not file.exists() or len(file.read_text().splitlines()) <= rows:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(command: Sequence[object], *, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """What a program printed and returned."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def kill(pid: int) -> None:
    """As the system kills a process when memory is short. Return when it is dead and the handlers of that have run."""
    process = psutil.Process(pid)
    process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):  # its status is left to others
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    time.sleep(0.1)
