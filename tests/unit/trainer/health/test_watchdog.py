"""Hangs are distinguished from long steps by heartbeats, and by what a thread here does."""

import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.trainer.health import watchdog as watchdog_module
from megatron.trainer.health.heartbeat import (
    Hang,
    Heartbeat,
    Observation,
    describe_frames,
    find_hang,
    waits_in_collective,
)
from megatron.trainer.health.stragglers import BusyClock, TimedMethod
from megatron.trainer.health.watchdog import Watchdog, timeout_before

T = 10.0
CPU = torch.device("cpu")


def seen(silent_s: float = 0.1, **changes: Any) -> Observation:
    """A rank that has waited in a collective for longer than T, but for the changes."""
    fields = {
        "host": "n0",
        "pid": 40,
        "number": 9,
        "stage": "train",
        "iteration": 7,
        "num_stages": 20,
        "stage_age_s": 11.0,
        "idle_s": 10.5,
        "is_waiting": True,
        "frames": ("megatron/trainer/step.py:9 in f",),
    }
    return Observation(heartbeat=Heartbeat(**{**fields, **changes}), silent_s=silent_s)


UNHEARD = Observation(heartbeat=None, silent_s=6.0)
SLEEPS = {"is_waiting": False}
WORKS = {"is_waiting": False, "idle_s": 0.1}


@pytest.mark.parametrize(
    ("observations", "reporter", "culprits", "words"),
    [
        pytest.param(
            [seen(6.0), seen()],
            1,
            (0,),
            "rank 0 on n0, pid 40, last heartbeat in .*: silent",
            id="silent lowest rank",
        ),
        pytest.param([seen(), seen(6.0), seen(6.0)], 0, (1, 2), "hang$", id="two silent"),
        pytest.param([seen(), UNHEARD], 0, (1,), r"rank 1 \(beside n0\) hangs", id="no heartbeat"),
        pytest.param([seen(), seen(**SLEEPS)], 0, (1,), "is idle and waits", id="sleeps"),
        pytest.param(
            [seen(), seen(is_waiting=False, idle_s=9.8)],
            0,
            (1,),
            "is idle and waits",
            id="slept later",
        ),
        pytest.param([seen(), seen(**WORKS)], 0, (1,), "is busy while others", id="loops"),
        pytest.param(
            [seen(), seen(num_stages=18), seen()],
            0,
            (1,),
            r"; 2 stage\(s\) behind the first",
            id="behind",
        ),
        pytest.param(
            [seen(), seen(num_stages=18), seen(**SLEEPS)],
            0,
            (2,),
            "is idle",
            id="waits, but not to blame",
        ),
        pytest.param([seen(), seen()], 0, (), "none stands out", id="all wait"),
        pytest.param([seen(**SLEEPS)], 0, (0,), "is idle and waits", id="one rank alone"),
        pytest.param([seen(**SLEEPS), seen(**SLEEPS)], 0, (0, 1), "hang$", id="all sleep"),
        pytest.param(
            [seen(has_left=True), seen(), seen(**SLEEPS)], 1, (2,), "rank 0 left", id="one has left"
        ),
    ],
)
def test_hang_is_found_and_those_who_block_it(
    observations: list[Observation], reporter: int, culprits: tuple[int, ...], words: str
) -> None:
    hang = find_hang(dict(enumerate(observations)), timeout_s=T)
    assert hang is not None
    assert (hang.reporter, hang.culprits) == (reporter, culprits)
    assert re.search(words, hang.message, re.MULTILINE), hang.message


@pytest.mark.parametrize(
    "observations",
    [
        pytest.param([seen(stage_age_s=1.0), seen(**SLEEPS)], id="one has just begun a stage"),
        pytest.param([seen(**WORKS), seen(**WORKS)], id="all compute, in a long step"),
        pytest.param([seen(idle_s=0.2), seen(**WORKS)], id="collectives within a long step"),
        pytest.param([seen(idle_s=9.0), seen(**WORKS)], id="a wait shorter than the time-out"),
        pytest.param([seen(**WORKS), seen(6.0)], id="one silent, the other computes"),
        pytest.param([seen(), Observation(heartbeat=None, silent_s=1.0)], id="no heartbeat so far"),
        pytest.param([seen(has_left=True), seen(has_left=True)], id="all have ended"),
        pytest.param([seen(6.0), seen(6.0)], id="nobody is left to report"),
    ],
)
def test_progress_is_not_taken_for_a_hang(observations: list[Observation]) -> None:
    assert find_hang(dict(enumerate(observations)), timeout_s=T) is None


def test_message_names_ranks_places_and_evidence() -> None:
    here = ("trainer/data/stream.py:80 in read", "trainer/step.py:12 in train_step")
    observations = [seen(), seen(), seen(), seen(host="n1", pid=51, is_waiting=False, frames=here)]
    hang = find_hang(dict(enumerate([*observations, seen()])), timeout_s=T)
    assert hang == Hang(
        reporter=0,
        culprits=(3,),
        message=(
            "no rank has made progress for 10 s: rank 3 on n1 hangs\n"
            "  rank 3 on n1, pid 51, stage 'train' of iteration 7: is idle and waits for no"
            " other rank\n"
            "    at trainer/data/stream.py:80 in read\n"
            "    at trainer/step.py:12 in train_step\n"
            "  ranks 0-2, 4, stage 'train' of iteration 7: waiting at"
            " megatron/trainer/step.py:9 in f"
        ),
    )


def test_heartbeat_survives_the_store() -> None:
    heartbeat = seen().heartbeat
    assert heartbeat is not None
    assert Heartbeat.from_json(heartbeat.to_json()) == heartbeat


def function_of(package: str, then: Callable[[], Any], file: str = "x.py") -> Callable[[], Any]:
    """Define a function in a module of `package` that calls `then`."""
    names: dict[str, Any] = {"__name__": f"{package}.module", "then": then}
    exec(compile("def function():\n    return then()\n", file, "exec"), names)
    function: Callable[[], Any] = names["function"]
    return function


def in_collective(then: Callable[[], Any]) -> Callable[[], Any]:
    """Call `then` from inside a collective, which pickles an object."""

    def call() -> Any:
        found: list[Any] = []
        names: dict[str, Any] = {"__name__": "torch.module", "then": then, "found": found}
        exec("def reduce(_object):\n    found.append(then())\n    return int, (0,)\n", names)
        pickled = type("Pickled", (), {"__reduce__": names["reduce"]})()
        dist.distributed_c10d._object_to_tensor(pickled, CPU, dist.group.WORLD)
        return found[0]

    return call


def timed(then: Callable[[], Any]) -> Callable[[], Any]:
    """Call `then` as --log-straggler calls a collective."""
    clock = BusyClock(CPU)
    clock._thread = threading.get_ident()
    return TimedMethod(clock, then)


@pytest.mark.parametrize(
    ("innermost_first", "waits"),
    [
        ([in_collective], True),
        ([partial(function_of, "torch"), in_collective], True),
        ([timed, partial(function_of, "project")], True),
        ([partial(function_of, "torch")], False),
        ([partial(function_of, "project")], False),
        ([partial(function_of, "project"), in_collective], False),
    ],
)
def test_collective_is_known_by_its_innermost_functions(
    innermost_first: list[Callable[..., Callable[[], Any]]], waits: bool
) -> None:
    call: Callable[[], Any] = lambda: waits_in_collective(sys._getframe(1))  # noqa: E731
    for wrap in innermost_first:
        call = wrap(call)
    assert call() is waits


def test_frames_are_listed_innermost_first_without_those_of_libraries() -> None:
    call: Callable[[], Any] = lambda: describe_frames(sys._getframe(1))  # noqa: E731
    call = function_of("torch", call, "/torch/a.py")
    call = timed(function_of("threading", call))
    call = function_of("project", call, "/home/me/project/data/read.py")
    call = function_of("step", call, "/x/step.py")
    assert call()[:2] == ("project/data/read.py:2 in function", "//x/step.py:2 in function")
    assert call()[2].split(":")[0] == "trainer/health/test_watchdog.py"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which a watchdog would have ended this process; its thread ends instead."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        sys.exit()

    def tell(arguments: threading.ExceptHookArgs, others: Any = threading.excepthook) -> None:
        if arguments.exc_type is not SystemExit:
            others(arguments)

    monkeypatch.setattr(watchdog_module.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", tell)
    return statuses


def await_end(ended: list[int], count: int) -> None:
    """Sleep until so many watchdogs would have ended their process, on a crowded machine too."""
    until = time.monotonic() + 30
    while len(ended) < count and time.monotonic() < until:
        time.sleep(0.05)


def alone(timeout_s: float) -> Watchdog:
    watchdog = Watchdog(rank=0, world_size=1, timeout_s=timeout_s, status=7)
    watchdog.start()
    return watchdog


def test_sleeping_rank_names_itself_and_ends(
    ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    watchdog = alone(0.4)
    began = time.monotonic()
    watchdog.on_stage("evaluate", 3)
    await_end(ended, 1)
    assert time.monotonic() - began >= 0.4
    watchdog.stop()
    assert ended == [7]
    said = capfd.readouterr().err
    assert "watchdog: no rank has made progress for 0.4 s: rank 0 on " in said
    assert "stage 'evaluate' of iteration 3: is idle" in said
    assert "test_watchdog.py:" in said and "test_sleeping_rank_names_itself_and_ends" in said


def make_progress(watchdog: Watchdog, progress: str, seconds: float) -> float:
    """Make progress for some seconds; return the longest pause in between."""
    longest, last = 0.0, time.monotonic()
    until = last + seconds
    while last < until:
        if progress == "stages":
            watchdog.on_stage("train", 1)
            time.sleep(0.1)
        else:
            sum(range(1000))
        last, before = time.monotonic(), last
        longest = max(longest, last - before)
    return longest


@pytest.mark.parametrize("progress", ["stages", "computes"])
def test_rank_that_makes_progress_is_left_alone(progress: str, ended: list[int]) -> None:
    for timeout_s in (0.8, 3.2, 12.8):
        ended.clear()
        watchdog = alone(timeout_s)
        paused_s = make_progress(watchdog, progress, 2.1 * timeout_s)
        watchdog.stop()
        if paused_s < timeout_s / 4:
            break
        # A crowded machine has stopped this thread meanwhile, so it made no progress.
    assert ended == []


def test_process_that_was_suspended_is_not_taken_for_hung(
    ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clocks have run on meanwhile; as a job that a scheduler suspends, or Ctrl-Z."""
    clock, passed_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + passed_s[0])
    watchdog = alone(10.0)
    looked = threading.Semaphore(0)
    sample = watchdog._thread.sample

    def look() -> tuple[float, bool]:
        looked.release()
        return sample()

    monkeypatch.setattr(watchdog._thread, "sample", look)
    for _ in range(2):
        assert looked.acquire(timeout=60)
    watchdog.on_stage("train", 1)
    passed_s[0] = 1000.0
    for _ in range(3):  # so it has taken two looks in whole
        assert looked.acquire(timeout=60)
    watchdog.stop()
    assert ended == []


def test_nothing_is_left_running_after_stop(ended: list[int]) -> None:
    before = threading.active_count()
    watchdog = alone(30.0)
    assert threading.active_count() == before + 1
    watchdog.stop()
    assert threading.active_count() == before
    watchdog.stop()
    assert ended == []


def test_two_ranks_end_with_one_message(
    ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 sleeps while rank 0 waits for it."""
    store = dist.HashStore()
    store.set("watchdog/0/reported", "1")  # in an attempt before
    finish = threading.Event()
    watchdogs = [
        Watchdog(rank=rank, world_size=2, timeout_s=0.6, status=7, store=store) for rank in (0, 1)
    ]
    for watchdog in watchdogs:  # as if they were made in two processes
        watchdog._name = "watchdog/0"

    def run(rank: int) -> None:
        watchdogs[rank].start()
        watchdogs[rank].on_stage("train", 5)
        if rank == 0:
            with watchdogs[rank].waiting():
                finish.wait()
        finish.wait()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    await_end(ended, 2)
    finish.set()
    for thread in threads:
        thread.join()
    for watchdog in watchdogs:
        watchdog.stop()
    assert ended == [7, 7]
    said = capfd.readouterr().err
    assert said.count("rank 1 on ") >= 1 and "rank 0 ends the job" in said
    assert said.count("ends the job") == 1
    assert (
        "rank 0, stage 'train' of iteration 5: waiting at trainer/health/test_watchdog.py:" in said
    )


def test_watchdog_reports_before_the_collectives_give_up() -> None:
    # It finds out within a tenth more than it is told to wait.
    assert 1.1 * timeout_before(10) < 600
    assert timeout_before(10) > 400
