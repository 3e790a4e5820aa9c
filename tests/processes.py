"""Programs that tests start; whatever happens, no process of theirs outlives the block."""

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence

import psutil

_MARK = "CONVMIXER_TEST_PROGRAM"


@contextlib.contextmanager
def started(command: Sequence[object], *, env: Mapping[str, str] = os.environ, **options) -> Iterator[subprocess.Popen]:
    """A running program; at the end of the block it is killed with all that it has started."""
    mark = uuid.uuid4().hex
    words = [str(word) for word in command]
    with subprocess.Popen(words, env={**env, _MARK: mark}, text=True, **options) as process:
        try:
            yield process
        finally:
            # Launchers give each of their processes a session of its own, so that the group would not hold them.
            for one in psutil.process_iter(["environ"]):
                if (one.info["environ"] or {}).get(_MARK) == mark:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()


def finish(command: Sequence[object], *, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """What a program printed and returned."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
