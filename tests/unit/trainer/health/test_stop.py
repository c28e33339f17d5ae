"""Notices, time limits and intervals that end a run; the journal of what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.trainer.config.schema import ReliabilityConfig, RunConfig, TrainingConfig
from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.health import stop
from megatron.trainer.health.stop import Stop, StopRule
from megatron.trainer.records import journal
from megatron.trainer.records.journal import Journal, open_journal
from megatron.trainer.records.record_file import read_records
from megatron.trainer.runtime import signals


@pytest.fixture(autouse=True)
def no_listening() -> Iterator[None]:
    yield
    signals.stop_listening()


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rule(*, train_iters: int = 100, iteration: int = 0, **flags: float) -> StopRule:
    cfg = RunConfig(
        training=TrainingConfig(train_iters=train_iters),
        reliability=ReliabilityConfig(**flags),  # type: ignore[arg-type]
    )
    return StopRule(cfg, device=torch.device("cpu"), iteration=iteration)


@pytest.mark.parametrize("notice", signals.NOTICES)
def test_notice_is_noted_once_listened_for(notice: signal.Signals) -> None:
    before = signal.getsignal(notice)
    signals.listen()
    signals.listen()
    assert signals.seen() is None
    os.kill(os.getpid(), notice)
    assert signals.seen() == notice
    signals.stop_listening()
    assert signals.seen() is None
    assert signal.getsignal(notice) == before


def test_first_notice_is_the_one_that_is_told() -> None:
    signals.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.seen() == signal.SIGUSR1


def test_notice_that_came_before_the_flag_was_read_kills_where_none_are_wanted() -> None:
    script = (
        "import os, signal\nfrom megatron.trainer.runtime import signals\nsignals.listen()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\nprint('alive', flush=True)\n"
        "signals.ignore_no_more()\nprint('dead')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGUSR1, "alive\n")


def test_signals_can_be_listened_for_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom megatron.trainer.runtime import signals\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_signal_stops_and_stays(world: None) -> None:
    made = rule()
    signals.listen()
    assert made.ask(3) is None
    os.kill(os.getpid(), signal.SIGTERM)
    stopped = made.ask(4)
    assert stopped == Stop(reason="signal", detail="SIGTERM received")
    assert stopped.requeue
    signals.stop_listening()
    assert made.ask(5) == made.stop == stopped


def test_duration_counts_from_the_start_of_the_process(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rule(exit_duration_in_mins=2.0)
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 119)
    assert made.ask(3) is None
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 120)
    assert made.ask(4) == Stop(reason="duration", detail="--exit-duration-in-mins 2 are over")
    assert stop.Stop(reason="duration", detail="").requeue


def test_interval_stops_at_its_multiples_but_not_where_the_run_began_or_ends(world: None) -> None:
    made = rule(exit_interval=5, iteration=10, train_iters=15)
    assert [made.ask(iteration) for iteration in (10, 11, 12, 13, 14, 15)] == [None] * 6
    made = rule(exit_interval=5, iteration=10)
    assert made.ask(15, is_evaluating=True) is None
    stopped = made.ask(15)
    assert stopped == Stop(reason="interval", detail="--exit-interval 5")
    assert not stopped.requeue


def ended(directory: Path) -> dict[str, object]:
    found = json.loads((directory / "ended.json").read_text())
    assert time.strptime(found.pop("time"), "%Y-%m-%dT%H:%M:%SZ")
    return dict(found)


def test_end_is_written_with_what_was_saved(tmp_path: Path) -> None:
    made = open_journal(str(tmp_path / "run"), rank=0, train_iters=9)
    made.on_save(4, 0.125)
    made.on_event(4, "rewind", "from iteration 5", rewound_from=5)
    with made.recording_errors():
        made.end(Stop(reason="signal", detail="SIGUSR1 received"))
    common = {"iteration": 4, "train_iters": 9, "saved_iteration": 4}
    assert ended(tmp_path / "run") == {
        **common,
        "reason": "signal",
        "detail": "SIGUSR1 received",
        "requeue": True,
    }
    events = list(read_records(tmp_path / "run" / "events.jsonl"))
    assert [event["event"] for event in events] == ["save", "rewind", "end"]
    assert (events[0]["iteration"], events[0]["detail"]) == (4, "0.1 s")
    assert events[1]["rewound_from"] == 5
    # The next job takes the end away, keeps the events, and may finish.
    made = open_journal(str(tmp_path / "run"), rank=0, train_iters=9)
    assert not (tmp_path / "run" / "ended.json").exists()
    made.on_step(9, 4.0)
    made.on_save(9, 0.0)
    with made.recording_errors():
        made.end(None)
    assert ended(tmp_path / "run")["reason"] == "finished"
    assert len(list(read_records(tmp_path / "run" / "events.jsonl"))) == 5


@pytest.mark.parametrize(
    ("error", "detail"),
    [(DataError("no such file"), "no such file"), (KeyError("x"), "KeyError: 'x'")],
)
def test_error_is_written_down_and_goes_on_its_way(
    error: Exception, detail: str, tmp_path: Path
) -> None:
    made = open_journal(str(tmp_path), rank=0, train_iters=9)
    made.on_event(3, "start")
    with pytest.raises(type(error)), made.recording_errors():
        raise error
    found = ended(tmp_path)
    assert (found["reason"], found["detail"], found["requeue"]) == ("error", detail, False)
    assert (found["iteration"], found["saved_iteration"]) == (3, None)


def test_second_run_in_a_directory_is_refused_until_the_first_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LOCK_PATIENCE_S", 0.3)
    holder = (
        "import sys, time\nfrom megatron.trainer.records.journal import open_journal\n"
        f"made = open_journal({str(tmp_path)!r}, rank=0, train_iters=1)\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        message = f"--save {tmp_path} is in use by process {first.pid} on .* since 20.*Z; two runs"
        with pytest.raises(ConfigError, match=message):
            open_journal(str(tmp_path), rank=0, train_iters=1)
        # Other ranks of the first run, and runs without a directory, hold nothing.
        open_journal(str(tmp_path), rank=1, train_iters=1)
        first.kill()
    made = open_journal(str(tmp_path), rank=0, train_iters=1)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    made.close()
    open_journal(str(tmp_path), rank=0, train_iters=1).close()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to --save .*file/run: Not a directory;"):
        open_journal(str(tmp_path / "file" / "run"), rank=0, train_iters=1)


def test_journal_without_a_directory_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Journal(None, train_iters=3)
    made.on_event(1, "start")
    with made.recording_errors():
        made.end(None)
    assert list(tmp_path.iterdir()) == []
