"""Parts computed by a pool of actors on Ray Data, on this machine or on many that see the same files.

Ray starts the actors and hands out parts. If an actor dies, Ray starts it again and repeats its parts.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from convmixer import errors
from convmixer.batch.predictor import Predictor
from convmixer.errors import ArgumentError, ConvMixerError, first_line, optional

_HINT = "start a cluster with `ray start --head`, and give its address, HOST:PORT"


class _Actor:
    """Optimizes the model where it runs, and writes the files of parts that Ray hands out.

    It returns errors of this package as values, class and text: Ray would wrap them in its own, with traces.
    """

    def __init__(self, predictor: Any, model: Any, optimize: Callable[[nn.Module], nn.Module]) -> None:
        ray: Any = optional("ray", "ray=", "ray")
        self.predictor: Predictor = ray.get(predictor)
        if self.predictor.workers is None:
            cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
            self.predictor = replace(self.predictor, workers=int(cores) - 1)
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self.model: nn.Module | None = None
        self.error: ConvMixerError | None = None
        try:
            self.model = optimize(ray.get(model).to(device))
        except ConvMixerError as error:
            self.error = error

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Write the parts in the column "part". Return a row: number of images, class and text of an error or ""."""
        images: list[int] = []
        try:
            if self.model is not None:
                self.predictor.write(self.model, rows["part"].tolist(), images.append)
        except ConvMixerError as error:
            self.error = error
        kind, text = (type(self.error).__name__, str(self.error)) if self.error else ("", "")
        return {"images": [sum(images)], "error": [kind], "text": [text]}


def write_on_ray(
    predictor: Predictor,
    model: nn.Module,
    optimize: Callable[[nn.Module], nn.Module],
    parts: Sequence[int],
    *,
    address: str | None,
    actors: int | None,
    advance: Callable[[int], object],
) -> None:
    """Write the files of parts as `Predictor.write` does, in actors.

    Args:
        predictor: What each actor does.
        model: The model, on the CPU, and not optimized yet.
        optimize: Optimizes it in the actor, on the device that Ray gives to it.
        parts: Numbers of the parts.
        address: Of a cluster; None: the one that `ray.init()` finds or starts. If the caller has connected to a
            cluster, that one is used.
        actors: Number of actors; None: one for each GPU of the cluster, without GPUs one for each machine.
        advance: Called with the number of images after each part.

    Raises:
        ArgumentError: No cluster answers, or it has fewer processor cores than actors.
        DependencyError: Ray is not installed.
        ConvMixerError: As `Predictor.write`, from an actor; or Ray itself failed.
    """
    ray: Any = optional("ray", "ray=", "ray")
    data: Any = optional("ray.data", "ray=", "ray")
    with _connected(ray, address), _quiet(data):
        count, resources = _share([node["Resources"] for node in ray.nodes() if node["Alive"]], actors)
        # Ray drops them when these references are gone, and an actor that is started again fetches them.
        stored = ray.put(predictor), ray.put(model)
        todo = data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        done = todo.map_batches(
            _Actor,
            fn_constructor_args=(*stored, optimize),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(count, len(parts)), max_tasks_in_flight_per_actor=2),
            **resources,
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"])(row["text"])
                advance(row["images"])
        except ray.exceptions.RayError as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ConvMixerError(f"Ray failed: {why}. Repeat the call: files already written are kept") from error


def check_address(address: str) -> None:
    """Raise ArgumentError if nothing answers at HOST:PORT: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)", address)
    if found is None:  # something else that `ray.init` takes, such as auto
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ArgumentError(f"no connection to Ray at {address!r}: {error}; {_HINT}") from error


def _share(nodes: Sequence[dict[str, float]], actors: int | None) -> tuple[int, dict[str, float]]:
    """Share machines among actors, so that all actors fit: one that does not fit would wait forever.

    Args:
        nodes: The resources of each machine, by Ray's names: "CPU", "GPU".
        actors: As in `write_on_ray`.

    Returns:
        The number of actors, and what each of them takes, as arguments of `map_batches`. With GPUs, only machines that
        have some are used, and actors share a GPU if there are more of them.

    Raises:
        ArgumentError: There are fewer cores than actors.
    """
    nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    count = actors or gpus or len(nodes)
    actors_per_gpu = -(-count // gpus) if gpus else 0
    most_actors = [actors_per_gpu * int(node["GPU"]) if gpus else -(-count // len(nodes)) for node in nodes]
    cores = [int(node["CPU"]) for node in nodes]
    cores_each = max(min((have // most for have, most in zip(cores, most_actors, strict=True)), default=0), 1)
    if sum(have // cores_each for have in cores) < max(count, 1):
        raise ArgumentError(
            f"actors={actors}: each needs a processor core, and Ray has {sum(cores)}"
            + (" where its GPUs are" if gpus else "")
        )
    return count, {"num_cpus": cores_each, **({"num_gpus": 1 / actors_per_gpu} if gpus else {})}


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster within the block, unless the caller has connected to one."""
    if ray.is_initialized():
        yield
        return
    silence = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        ray.init(address, **silence)
    except Exception as error:  # Ray raises its own, ConnectionError, ValueError, and bare ones
        at_address = f" at {address!r}" if address else ""
        raise ArgumentError(f"no connection to Ray{at_address}: {first_line(error)}; {_HINT}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet(data: Any) -> Iterator[None]:
    """Let Ray Data print only errors within the block: this package shows the progress."""
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before
        logger.setLevel(level)
