"""Batches read ahead in a thread: the same as without it, and no thread is left."""

import gc
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron.trainer.data.batch import Batch
from megatron.trainer.data.read_ahead import Loading, ReadAhead
from megatron.trainer.data.sampler import Phase
from megatron.trainer.data.source import MockSource, WindowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import DataError

S = 4
ALONE: dict[str, Any] = {
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "data_parallel_rank": 0,
    "data_parallel_size": 1,
}


def source(name: str, num_windows: int, **fields: Any) -> WindowSource:
    tokens = num_windows * S + 1
    return WindowSource(
        name=name,
        tokens=np.arange(tokens),
        start_token=0,
        stop_token=tokens,
        seq_length=S,
        seed=3,
        **fields,
    )


def stream(num_ahead: int, *, num_samples: int | None = None, **fields: Any) -> SampleStream:
    sources = [source("a", 20, **fields), source("b", 7, **fields)]
    phases = [
        Phase(name="first", sources=("a", "b"), weights=(3.0, 1.0), num_samples=40),
        Phase(name="rest", sources=("b", "a"), weights=(1.0, 1.0), num_samples=num_samples),
    ]
    loading = Loading(num_ahead=num_ahead)
    return SampleStream(sources, phases, seq_length=S, seed=3, loading=loading)


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in batches]


def eventually(value: Callable[[], object], wanted: object = True) -> bool:
    """Whether it comes to equal what is wanted within some seconds."""
    end = time.monotonic() + 60
    while value() != wanted and time.monotonic() < end:
        time.sleep(0.005)
    return value() == wanted


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = readers()
    yield
    if readers() - before:
        gc.collect()
    assert eventually(lambda: readers() <= before)


class Counting:
    """Counts up, and records how far it got."""

    def __init__(self, error_at: int | None = None) -> None:
        self.taken = 0
        self.error_at = error_at

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> int:
        if self.taken == self.error_at:
            raise DataError(f"cannot read item {self.taken}")
        self.taken += 1
        return self.taken - 1


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_items_come_in_order_and_no_more_are_taken_than_the_limit(
    num_ahead: int,
) -> None:
    items = Counting()
    reader = ReadAhead(items, Loading(num_ahead=num_ahead))
    for n in range(10):
        assert next(reader) == n
        assert eventually(lambda: items.taken, n + 1 + num_ahead)
    time.sleep(0.02)
    assert items.taken == 10 + num_ahead
    reader.close()
    assert list(ReadAhead(iter(range(5)), Loading(num_ahead=num_ahead))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_error_is_raised_where_its_item_is_asked_for(num_ahead: int) -> None:
    reader = ReadAhead(Counting(error_at=2), Loading(num_ahead=num_ahead))
    assert [next(reader), next(reader)] == [0, 1]
    with pytest.raises(DataError, match=r"^cannot read item 2$"):
        next(reader)


def test_next_item_is_taken_while_the_current_one_is_used() -> None:
    asked = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        asked.set()
        yield 1

    reader = ReadAhead(items(), Loading(num_ahead=1))
    assert next(reader) == 0
    assert asked.wait(120)


@pytest.mark.parametrize("seed", range(12))
def test_stream_is_the_same_with_and_without_a_thread(seed: int) -> None:
    """Resumes, skipped samples and other batch sizes; states are of what was returned."""
    rng = random.Random(seed)
    plain, ahead = stream(0), stream(rng.randint(1, 3))
    states = [plain.state_dict()]
    sizes = dict(ALONE)
    for _ in range(40):
        action = rng.random()
        if action < 0.1:
            state = rng.choice(states)
            assert plain.load_state_dict(state) == ahead.load_state_dict(state)
        elif action < 0.2:
            counts = {"a": rng.randint(0, 5), "b": rng.randint(0, 5)}
            plain.skip(counts)
            ahead.skip(counts)
        elif action < 0.3:
            sizes["global_batch_size"] = rng.choice([4, 8, 16])
            sizes["micro_batch_size"] = rng.choice([1, 2])
        elif action < 0.4:
            ahead.stop_reading()
        assert ids(ahead.next_global_batch(**sizes)) == ids(plain.next_global_batch(**sizes))
        assert (ahead.phase, ahead.consumed_samples) == (plain.phase, plain.consumed_samples)
        assert ahead.state_dict() == plain.state_dict()
        states.append(plain.state_dict())


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_end_of_the_phases_is_raised_by_the_step_that_needs_more(num_ahead: int) -> None:
    drawn = stream(num_ahead, num_samples=8)
    for _ in range(6):
        drawn.next_global_batch(**ALONE)
    state = drawn.state_dict()
    for _ in range(2):
        with pytest.raises(DataError, match=r"^all 2 phases are used up after 48 samples; the run"):
            drawn.next_global_batch(**ALONE)
        assert drawn.state_dict() == state


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_token_outside_the_vocabulary_is_raised_by_the_step_that_needs_it(num_ahead: int) -> None:
    healthy, drawn = stream(0), stream(num_ahead, vocab_size=70)
    taken = 0
    with pytest.raises(DataError, match=re.escape("but the vocabulary has 70 ids")) as caught:
        while True:
            drawn.next_global_batch(**ALONE)
            taken += 1
    assert caught.value.is_local
    batches = [healthy.next_global_batch(**ALONE) for _ in range(taken + 1)]
    worst = [max(int(batch.labels.max()) for batch in step) for step in batches]
    assert [number >= 70 for number in worst] == [False] * taken + [True]
    assert drawn.consumed_samples == 8 * taken


def test_thread_ends_with_the_stream_and_restarts_when_needed() -> None:
    before = readers()
    drawn = stream(1)
    drawn.next_global_batch(**ALONE)
    (thread,) = readers() - before
    drawn.stop_reading()
    thread.join(10)
    assert not thread.is_alive()
    drawn.next_global_batch(**ALONE)
    (thread,) = readers() - before
    del drawn
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_restarts_the_thread() -> None:
    drawn, truth = stream(1), stream(0)
    expected = [ids(truth.next_global_batch(**ALONE)) for _ in range(4)]
    assert ids(drawn.next_global_batch(**ALONE)) == expected[0]
    child = os.fork()
    if child == 0:
        found = [ids(drawn.next_global_batch(**ALONE)) for _ in range(3)]
        os._exit(0 if found == expected[1:] else 1)
    end = time.monotonic() + 120
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status[0] == child and os.waitstatus_to_exitcode(status[1]) == 0
    assert [ids(drawn.next_global_batch(**ALONE)) for _ in range(3)] == expected[1:]


def test_process_exits_while_batches_are_read_ahead() -> None:
    program = (
        "import itertools, time\n"
        "from megatron.trainer.data.read_ahead import Loading, ReadAhead\n"
        "slow = (time.sleep(0.05) or n for n in itertools.count())\n"
        "reader = ReadAhead(slow, Loading(num_ahead=2))\n"
        "next(reader)\n"
        "raise SystemExit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=300, check=False)
    assert ended.returncode == 7


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_validation_is_the_same_with_and_without_a_thread_and_may_stop_early(
    num_ahead: int,
) -> None:
    plain = ValidationSet("v", source("v", 50))
    ahead = ValidationSet("v", source("v", 50), Loading(num_ahead=num_ahead))
    expected = [ids(batches) for batches in plain.batches(4, **ALONE)]
    assert [ids(batches) for batches in ahead.batches(4, **ALONE)] == expected
    for batches in ahead.batches(4, **ALONE):
        assert ids(batches) == expected[0]
        break


def test_random_tokens_are_the_same_with_and_without_a_thread() -> None:
    mock = MockSource(vocab_size=50, seq_length=S, seed=1)
    phases = [Phase(sources=("mock",), weights=(1.0,))]
    plain, ahead = (
        SampleStream([mock], phases, seq_length=S, seed=1, loading=Loading(num_ahead=n))
        for n in (0, 1)
    )
    for _ in range(5):
        pairs = zip(plain.next_global_batch(**ALONE), ahead.next_global_batch(**ALONE), strict=True)
        assert all(torch.equal(one.labels, other.labels) for one, other in pairs)
