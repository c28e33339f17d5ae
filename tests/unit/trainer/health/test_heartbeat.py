"""What a heartbeat says of the thread that trains: idle or busy, waiting for others or not."""

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.trainer.data.read_ahead import Loading, ReadAhead
from megatron.trainer.health.heartbeat import TrainingThread

CPU = torch.device("cpu")


class Parked:
    """A thread that runs `action`, and has begun with it, while the test looks at it."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.thread = threading.Thread(target=action, daemon=True)
        self.thread.start()
        until = time.monotonic() + 30
        while not self._is_at(action) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)

    def _is_at(self, action: Callable[[], Any]) -> bool:
        assert self.thread.ident is not None
        frame = sys._current_frames().get(self.thread.ident)
        while frame is not None and frame.f_code is not action.__code__:
            frame = frame.f_back
        return frame is not None


def becomes_idle(look: TrainingThread) -> bool:
    """Whether a thread comes to be idle over several samples."""
    until = time.monotonic() + 30
    while look.sample()[0] < 0.39 and time.monotonic() < until:
        time.sleep(0.1)
    return look.sample()[0] >= 0.39


def is_seen_busy(look: TrainingThread) -> bool:
    """Whether a thread is busy in one of many samples; a crowded machine may leave it no time."""
    for _ in range(100):
        time.sleep(0.1)
        if look.sample()[0] == 0.0:
            return True
    return False


def test_wait_for_work_that_was_begun_before_is_known_by_its_name() -> None:
    lock = threading.Lock()
    lock.acquire()
    work = types.SimpleNamespace(wait=lock.acquire, other=lock.acquire)
    parked = [Parked(lambda: work.wait()), Parked(lambda: work.other())]
    looks = [TrainingThread(each.thread, CPU).stack()[0] for each in parked]
    for each in parked:
        lock.release()
        each.thread.join()
        lock.acquire(blocking=False)
    assert looks == [True, False]


def test_sleeping_thread_is_idle_and_computing_one_is_not() -> None:
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(1000))

    parked = [Parked(lambda: done.wait()), Parked(compute)]
    looks = [TrainingThread(each.thread, CPU) for each in parked]
    assert becomes_idle(looks[0])
    looks[1].sample()
    is_busy = is_seen_busy(looks[1])
    done.set()
    assert is_busy


def test_reading_thread_is_not_idle_although_it_computes_next_to_nothing(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"0" * 100)
    done = threading.Event()

    def read() -> None:
        while not done.wait(0.05):
            file.read_bytes()

    parked = Parked(read)
    look = TrainingThread(parked.thread, CPU)
    if not Path(f"/proc/self/task/{parked.thread.native_id}/io").exists():
        pytest.skip("this system does not count what a thread reads")
    is_busy = [is_seen_busy(look) for _ in range(3)]
    done.set()
    assert all(is_busy)


def test_thread_that_waits_for_a_batch_is_as_idle_as_the_thread_that_reads_it() -> None:
    begun, finish, done = threading.Event(), threading.Event(), threading.Event()

    def batches() -> Iterator[int]:
        begun.set()
        while not finish.is_set():
            sum(range(1000))
        done.wait()
        yield 1

    reader = ReadAhead(batches(), Loading(num_ahead=1))
    parked = Parked(lambda: next(reader))
    assert begun.wait(120)
    look = TrainingThread(parked.thread, CPU)
    is_busy = [is_seen_busy(look) for _ in range(4)]
    finish.set()
    idle = becomes_idle(look)
    done.set()
    parked.thread.join()
    reader.close()
    assert all(is_busy)
    assert idle
