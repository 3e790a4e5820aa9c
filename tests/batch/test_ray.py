"""Inference over data sets on Ray: the rows are those of one process, even if an actor or the driver is killed.

The cluster is a program of its own, as on many machines, and ends with these tests; nothing of Ray runs in the process
of the tests. They choose its ports: on a busy machine Ray gives up while it looks for free ones.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import write_digits
from processes import alive, finish, started

import convmixer
from convmixer.batch.cluster import _share
from convmixer.errors import ArgumentError

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'convmixer[batch]'")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'convmixer[ray]'")

COUNT, ROWS = 320, 10
TIMEOUT = 1200  # seconds: on a busy machine Ray takes minutes to start
PROGRAM = """
import json, sys
import convmixer

data, output, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
options = {"rows_per_file": 10, "batch_size": 1, "backend": "eager", "workers": 0}  # slow, so that it can be killed
summary = convmixer.predict_dataset(model, data, output, **options, **settings)
print(summary)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Handwritten digits, and among them a file that is not an image."""
    folder = write_digits(tmp_path_factory.mktemp("digits"), COUNT - 1, 0, ("zero", "one", "two")) / "train"
    (folder / "one" / "broken.png").write_bytes(b"no image")
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two cores on this machine: its address, its process, and the environment of its users."""
    port, *others = _free_ports(5)
    ports = [
        f"--{name}={number}"
        for name, number in zip(
            (
                "dashboard-agent-grpc-port",
                "runtime-env-agent-port",
                "metrics-export-port",
                "dashboard-agent-listen-port",
            ),
            others,
            strict=True,
        )
    ]
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    folder = Path("/tmp", f"ray-{port}")  # paths of sockets have to be short
    log = tmp_path_factory.mktemp("ray") / "log"
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", *ports, f"--temp-dir={folder}"]
    command += ["--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"]
    with log.open("w") as file, started(command, env=env, stdout=file, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + TIMEOUT
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", process, env
        # Ray's processes rename themselves, and with that hide the mark that `started` looks for.
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, running = psutil.wait_procs(family, timeout=5)
    for child in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not psutil.wait_procs(family, timeout=TIMEOUT)[1]
    subprocess.run(["rm", "-rf", folder], check=True)


def rows(output: Path) -> list[dict]:
    return [row for file in sorted(output.glob("*.parquet")) for row in pq.ParquetFile(file).read().to_pylist()]


def program(data, output, **settings) -> list[object]:
    """The command of a process that calls `predict_dataset`."""
    return [sys.executable, "-c", PROGRAM, data, output, json.dumps(settings)]


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory) -> list[dict]:
    """The rows of one process."""
    output = tmp_path_factory.mktemp("expected") / "out"
    result = finish(program(digits, output), env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found = rows(output)
    assert len(found) == COUNT
    assert [row["image"] for row in found if row["error"]] == ["one/broken.png"]
    return found


def _wait_for_file(process, output: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not list(output.glob("part*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _actors(cluster_process) -> list[psutil.Process]:
    found = []
    for child in alive(cluster_process):
        try:
            title = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::MapWorker"):
            found.append(child)
    return found


@pytest.mark.slow
def test_two_actors(digits, expected, cluster, tmp_path):
    address, _, env = cluster
    result = finish(program(digits, tmp_path / "out", ray=address, actors=2), env=env, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "out") == expected
    assert f"images={COUNT}, errors=1, files={COUNT // ROWS}, kept=0" in result.stdout


@pytest.mark.slow
def test_an_actor_that_is_killed(digits, expected, cluster, tmp_path):
    """Ray starts it again and repeats its parts."""
    address, process, env = cluster
    output = tmp_path / "out"
    command = program(digits, output, ray=address, actors=2)
    with started(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        _wait_for_file(driver, output)
        actors = _actors(process)
        assert len(actors) == 2
        actors[0].send_signal(signal.SIGKILL)
        assert len(list(output.glob("part*"))) < COUNT // ROWS
        printed, errors = driver.communicate(timeout=TIMEOUT)
        assert driver.returncode == 0, errors
    assert rows(output) == expected
    assert "kept=0" in printed


@pytest.mark.slow
def test_a_driver_that_is_killed(digits, expected, cluster, tmp_path):
    """Its actors end with it, and the next run resumes, here in one process."""
    address, process, env = cluster
    output = tmp_path / "out"
    with started(program(digits, output, ray=address, actors=2), env=env) as driver:
        _wait_for_file(driver, output)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + TIMEOUT
    while _actors(process):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    kept = len(list(output.glob("part*")))
    assert 1 <= kept < COUNT // ROWS
    result = finish(program(digits, output), env=env, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert f"kept={kept * ROWS}" in result.stdout
    assert rows(output) == expected


@pytest.mark.slow
def test_command_and_errors_of_actors(digits, cluster, tmp_path):
    address, _, env = cluster
    command = [sys.executable, "-m", "convmixer", "predict", "--data", digits, "--workers", 0, "--rows-per-file", 160]
    options = ["--ray", address, "--actors", 2, "--topk", 1, "--embed", "--output", tmp_path / "out"]
    result = finish([*command, *options], env=env, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert f"{COUNT} images, of which 1 could not be read" in result.stdout
    assert result.stderr.startswith(f"{COUNT} images from train/\n")
    assert len(result.stderr.splitlines()) <= 2  # Ray itself writes a line about the arguments of actors
    assert len(rows(tmp_path / "out")[0]["embedding"]) == 256
    result = finish([*command, *options[:2], "--actors", 3, "--output", tmp_path / "more"], env=env, timeout=TIMEOUT)
    assert result.returncode == 2
    assert "actors=3: each needs a processor core, and Ray has 2" in result.stderr
    result = finish(
        [*command, *options[:4], "--backend", "triton", "--output", tmp_path / "triton"], env=env, timeout=TIMEOUT
    )
    assert result.returncode == 2
    assert "error: backend='triton'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no.such.host.invalid:{}", "127.0.0.1:{}0000"]
)
def test_no_cluster_there(digits, tmp_path, address):
    """The error comes at once, before anything is written; Ray itself would try for more than five minutes."""
    address = address.format(*_free_ports(1))
    model = convmixer.create_model("convmixer_256_8", device="cpu")
    with pytest.raises(
        ArgumentError, match=rf"no connection to Ray at '{address}': .*; start a cluster with `ray start"
    ):
        convmixer.predict_dataset(model, digits, tmp_path / "out", ray=address)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("nodes", "actors", "expected"),
    [
        ([{"CPU": 2}], 2, (2, {"num_cpus": 1})),
        ([{"CPU": 16}, {"CPU": 8}, {"memory": 1}], None, (2, {"num_cpus": 8})),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 64}], None, (2, {"num_cpus": 8, "num_gpus": 1})),
        ([{"CPU": 16, "GPU": 2}], 3, (3, {"num_cpus": 4, "num_gpus": 0.5})),
    ],
)
def test_what_an_actor_takes(nodes, actors, expected):
    """All actors must fit: one that does not would wait forever."""
    assert _share(nodes, actors) == expected


@pytest.mark.parametrize(("nodes", "actors"), [([{"CPU": 2}], 3), ([{"memory": 1}], None), ([{"CPU": 0.5}], 1)])
def test_too_many_actors(nodes, actors):
    with pytest.raises(ArgumentError, match=f"actors={actors}: each needs a processor core, and Ray has"):
        _share(nodes, actors)
