"""Tests whether a job is requeued: by ended.json, number of restarts and new checkpoints."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_app.slurm import requeue

SCRIPT = Path(requeue.__file__)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


def save(run: Path, iteration: int) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


def end(run: Path, reason: str, *, requeue: bool = False, **more: Any) -> None:
    ended = {"reason": reason, "detail": "", "iteration": 7, "train_iters": 100, "requeue": requeue}
    (run / "ended.json").write_text(json.dumps({**ended, **more}))


def begin(run: Path, job: str = "12", *flags: str) -> int:
    return requeue.main(["begin", str(run), "--job", job, *flags])


def decide(run: Path, *flags: str, job: str = "12", status: int = 0) -> int:
    return requeue.main(["end", str(run), "--job", job, "--status", str(status), *flags])


def test_finished_run_is_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(run) == 0
    end(run, "finished", iteration=100)
    assert decide(run) == 0
    assert "ended at iteration 100 of 100 (finished: no detail)" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 1, 143])
@pytest.mark.parametrize("reason", ["signal", "duration"])
def test_stopped_run_is_requeued_whatever_status_torchrun_returns(
    reason: str, status: int, run: Path
) -> None:
    begin(run)
    save(run, 7)
    end(run, reason, requeue=True)
    assert decide(run, status=status) == 75


def test_run_stopped_by_exit_interval_is_done(run: Path) -> None:
    begin(run)
    end(run, "interval")
    assert decide(run) == 0


def test_error_is_a_failure_with_its_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run)
    end(run, "error", detail="the loss is nan")
    assert decide(run, status=1) == 1
    assert capsys.readouterr().err == "failed: the loss is nan\n"
    # Exit status 0 does not turn an error into a success.
    assert decide(run) == 1


def test_finished_run_whose_step_failed_is_a_failure(run: Path) -> None:
    begin(run)
    end(run, "finished")
    assert decide(run, status=1) == 1


@pytest.mark.parametrize("status", [0, 1])
def test_missing_ended_json_is_a_failure(
    status: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run)
    save(run, 50)
    assert decide(run, status=status) == 1
    assert f"with status {status} and wrote no {run}/ended.json" in capsys.readouterr().err


def test_ended_json_of_an_earlier_start_is_ignored(run: Path) -> None:
    end(run, "signal", requeue=True)
    save(run, 7)
    begin(run)
    assert decide(run, status=1) == 1


def restart(run: Path, iteration: int, *flags: str) -> tuple[int, int]:
    """Start once more, save `iteration` and stop; return the statuses of `begin` and `end`."""
    began = begin(run, "12", *flags)
    save(run, iteration)
    end(run, "signal", requeue=True)
    return began, decide(run, *flags)


def test_run_with_new_checkpoints_is_requeued_up_to_the_limit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cap = ("--max-restarts", "3")
    # The first start and three restarts; the last is not requeued.
    found = [restart(run, iteration, *cap) for iteration in (10, 20, 30, 40)]
    assert found == [(0, 75), (0, 75), (0, 75), (0, 1)]
    assert "job 12 was restarted 3 times, which is the limit" in capsys.readouterr().err
    # SLURM may still requeue it after a node failure; then it does not train.
    assert begin(run, "12", *cap) == 1
    # A newly submitted job has its own count.
    assert begin(run, "13", *cap) == 0


def test_run_without_new_checkpoints_is_requeued_up_to_the_limit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stalled = ("--max-stalled", "2")
    found = [restart(run, 10, *stalled) for _ in range(4)]
    # 0 to 10 is a new checkpoint; then two restarts in a row may save nothing.
    assert found == [(0, 75), (0, 75), (0, 75), (0, 1)]
    assert "3 restarts of job 12 in a row have saved nothing newer than iteration 10" in (
        capsys.readouterr().err
    )


def test_new_checkpoint_resets_the_stalled_count(run: Path) -> None:
    stalled = ("--max-stalled", "1")
    found = [restart(run, iteration, *stalled) for iteration in (5, 5, 6, 6, 7, 7)]
    assert set(found) == {(0, 75)}
    assert restart(run, 7, *stalled) == (0, 1)


def test_slurms_own_restarts_are_counted(run: Path) -> None:
    """Calls `begin` alone, as `end` does not run after a node failure."""
    found = [begin(run, "12", "--max-stalled", "2") for _ in range(4)]
    assert found == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ended.json", "{", "ended.json is not JSON"),
        ("ended.json", "[]", "ended.json holds [], not an object"),
        ("ended.json", '{"reason": "signal"}', "lacks a reason and whether to requeue"),
        ("requeue.json", '{"job": "12"}', "must hold job, restarts, stalled, saved"),
        (
            "requeue.json",
            '{"job": "12", "restarts": -9, "stalled": 0, "saved": 0}',
            "must hold job",
        ),
        ("ended.json", "[" * 100_000, "ended.json is not JSON"),
        ("latest_checkpointed_iteration.txt", "release", "holds 'release'"),
        ("latest_checkpointed_iteration.txt", "²", "holds '²'"),
        ("latest_checkpointed_iteration.txt", "9" * 5000, "must be the newest checkpoint's number"),
    ],
)
def test_damaged_file_is_a_failure_that_names_it(
    name: str, text: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run)
    end(run, "signal", requeue=True)
    (run / name).write_text(text)
    assert decide(run) == 1
    assert message in capsys.readouterr().err


def test_pipe_does_not_block(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run)
    os.mkfifo(run / "ended.json")
    assert decide(run) == 1
    assert "ended.json is not a regular file" in capsys.readouterr().err


def test_control_characters_are_not_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run)
    end(run, "error", detail="a\x1b[31m\nb")
    assert decide(run) == 1
    assert capsys.readouterr().err == "failed: a?[31m\nb\n"


def test_missing_run_directory_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(tmp_path / "gone") == 1
    assert "there is no run directory" in capsys.readouterr().err


def test_wrong_usage_is_status_2(run: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        requeue.main(["end", str(run), "--job", "12"])
    assert exit_.value.code == 2


def test_script_runs_on_python_3_7_without_packages(run: Path) -> None:
    text = SCRIPT.read_text("utf-8")
    tree = ast.parse(text, feature_version=(3, 7))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
    assert {module.partition(".")[0] for module in modules} <= set(sys.stdlib_module_names)
    # -I -S: no packages, no environment.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "begin", str(run), "--job", "12"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "job 12 starts; newest checkpoint: none\n")
