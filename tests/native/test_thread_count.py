"""Calls that other programs hold up, by a clock of the test's own; and that the number of threads changes no bit."""

import pytest
import torch
from runtimes import HAS_NATIVE, NO_NATIVE, make

from convmixer import optimize
from convmixer.native import thread_count
from convmixer.native.packing import Native
from convmixer.native.thread_count import ThreadCount
from convmixer.runtime.folding import fold

SMALL, LARGE = (1, 3, 32, 32), (64, 3, 32, 32)


class Machine:
    """A clock, and calls that take 1 ms with two threads and 2 ms with one, or 50 ms with two on a busy machine."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(thread_count.time, "perf_counter", lambda: self.now)
        self.now, self.busy, self.count = 0.0, False, ThreadCount(2)

    def call(self, shape=SMALL) -> int:
        threads = self.count.next()
        seconds = 0.002 if threads == 1 else 0.05 if self.busy else 0.001
        seconds *= shape[0]
        self.now += seconds
        self.count.note(shape, threads, seconds)
        return threads

    def seconds_of(self, calls: int) -> float:
        begun = self.now
        for _ in range(calls):
            self.call()
        return self.now - begun


def test_all_threads_unless_they_are_held_up(monkeypatch):
    machine = Machine(monkeypatch)
    assert {machine.call(shape) for _ in range(100) for shape in (SMALL, LARGE)} == {2}


def test_one_thread_while_the_machine_is_busy(monkeypatch):
    machine = Machine(monkeypatch)
    machine.seconds_of(10)
    machine.busy = True
    assert [machine.call() for _ in range(20)] == [2] + 19 * [1]
    assert machine.seconds_of(2000) < 1.2 * 2000 * 0.002  # it tries all of them ever more rarely
    machine.busy = False
    machine.seconds_of(2500)
    assert [machine.call() for _ in range(500)] == 500 * [2]
    machine.busy = True
    assert [machine.call() for _ in range(20)] == [2] + 19 * [1]  # breaks are short again
    machine.busy = False
    machine.seconds_of(50)
    assert machine.call() == 2


def test_the_first_call_of_a_size_is_slow_without_being_held_up(monkeypatch):
    """It takes memory; and images of many sizes take no memory for ever."""
    count = ThreadCount(2)
    for side in range(3000):
        count.note((1, 3, side, side), 2, 5.0)
        assert count.next() == 2
    count.note((1, 3, 2999, 2999), 2, 0.1)
    assert count.next() == 2
    assert len(count._fastest) <= 1001


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_any_number_gives_the_same_bits(dtype, batch):
    x, model = torch.randn(batch, 3, 34, 50), make(dim=128, kernel_size=9)
    one, *others = (optimize(model, backend="native", dtype=dtype, threads=threads)(x) for threads in (1, 2, 3, 5, 12))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.skipif(not HAS_NATIVE, reason=NO_NATIVE)
@torch.no_grad()
def test_the_kernels_get_that_number(monkeypatch):
    native = Native(fold(make()), torch.float32, threads=3)
    forward, given = native._forward, []
    native._forward = lambda *arguments: given.append(arguments[-1]) or forward(*arguments)
    x = torch.randn(1, 3, 16, 16)
    native(x)
    native._thread_count.note(tuple(x.shape), 3, 10.0)  # held up
    native(x)
    monkeypatch.setattr(thread_count, "_forked", True)
    native(x)
    assert given == [3, 1, 1]
