"""The journal locks a run directory, and records events and the end of the run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.trainer.errors import ConfigError, DataError
from megatron.trainer.health.stop import Stop
from megatron.trainer.hooks import journal
from megatron.trainer.hooks.journal import Journal, open_journal
from megatron.trainer.records.record_file import read_records


def ended(directory: Path) -> dict[str, object]:
    found = json.loads((directory / "ended.json").read_text())
    assert time.strptime(found.pop("time"), "%Y-%m-%dT%H:%M:%SZ")
    return dict(found)


def test_end_is_written_with_what_was_saved(tmp_path: Path) -> None:
    made = open_journal(str(tmp_path / "run"), rank=0, train_iters=9)
    made.on_step(4, 5.0)
    made.on_save(3, seconds=0.125, blocked_seconds=0.0625)  # written while step 4 was taken
    made.on_save(4, seconds=2.0, blocked_seconds=2.0)
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
    assert [event["event"] for event in events] == ["save", "save", "rewind", "end"]
    assert events[0]["detail"] == "0.1 s, training stood still for 0.1 s"
    assert [events[0][key] for key in ("iteration", "seconds", "blocked_seconds")] == [
        *(3, 0.125, 0.062),
    ]
    assert events[2]["rewound_from"] == 5
    # The next job takes the end away, keeps the events, and may finish.
    made = open_journal(str(tmp_path / "run"), rank=0, train_iters=9)
    assert not (tmp_path / "run" / "ended.json").exists()
    made.on_step(9, 4.0)
    made.on_save(9, seconds=0.0, blocked_seconds=0.0)
    with made.recording_errors():
        made.end(None)
    assert ended(tmp_path / "run")["reason"] == "finished"
    assert len(list(read_records(tmp_path / "run" / "events.jsonl"))) == 6


@pytest.mark.parametrize(
    ("error", "detail"),
    [(DataError("no such file"), "no such file"), (KeyError("x"), "KeyError: 'x'")],
)
def test_error_is_recorded_and_raised(error: Exception, detail: str, tmp_path: Path) -> None:
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
        "import sys, time\nfrom megatron.trainer.hooks.journal import open_journal\n"
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
