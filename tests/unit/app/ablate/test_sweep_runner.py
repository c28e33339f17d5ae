"""Tests which runs of a sweep are started, and what becomes of those that fail or are stopped."""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moe_app.ablate import sweep_runner
from moe_app.ablate.studies_file import Branch, Run, Sweep
from moe_app.ablate.sweep_jobs import SweepJob, write_recipe
from moe_app.ablate.sweep_runner import SweepRunner, SweepStopped
from moe_app.pretrain.config import PretrainConfig

SWEEP = Sweep(path="studies.yaml", nproc_per_node=1, seeds=(1,), runs={}, studies=())
FINISH = 'echo \'{"reason": "finished"}\' > "$0/ended.json"; echo "$0" >> "$0/../order"'
Scripts = dict[str, Sequence[str]]


def make_job(root: Path, name: str, after: str | None = None) -> SweepJob:
    branch = None if after is None else Branch(run=after, iteration=1)
    return SweepJob(
        run=Run(name=name, recipe="recipe.yaml", anneal_from=branch),
        seed=1,
        cfg=PretrainConfig(),
        directory=root / name,
        source=None if after is None else root / after,
        ranks=1,
    )


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """Shell scripts in place of what trains, by the run's name; $0 is its directory."""
    found: Scripts = {}
    monkeypatch.setattr(
        sweep_runner,
        "commands_of",
        lambda job: [
            ["/bin/sh", "-c", script, str(job.directory)]
            for script in found.get(job.run.name, [FINISH])
        ],
    )
    monkeypatch.setattr(sweep_runner, "POLL_S", 0.01)
    return found


def order(root: Path) -> list[str]:
    return [Path(line).name for line in (root / "order").read_text().splitlines()]


def test_runs_wait_for_what_they_begin_from(scripts: Scripts, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "tail", "trunk"), make_job(tmp_path, "trunk")]
    scripts["trunk"] = ["true", FINISH]

    outcome = SweepRunner(SWEEP, jobs, side_by_side=2, say=lambda line: None).run()

    assert order(tmp_path) == ["trunk", "tail"]
    assert outcome.status == 0
    assert {str(job) for job in outcome.finished} == {"trunk seed 1", "tail seed 1"}


def test_finished_runs_are_not_started_again(scripts: Scripts, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "trunk"), make_job(tmp_path, "tail", "trunk")]
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk/ended.json").write_text(json.dumps({"reason": "finished"}))

    lines: list[str] = []
    SweepRunner(SWEEP, jobs, side_by_side=1, say=lines.append).run()

    assert order(tmp_path) == ["tail"]
    assert lines[0] == "2 runs: 1 finished before, 1 to train, 1 side by side"


def test_a_failed_run_is_named_and_the_others_go_on(scripts: Scripts, tmp_path: Path) -> None:
    jobs = [
        make_job(tmp_path, "trunk"),
        make_job(tmp_path, "tail", "trunk"),
        make_job(tmp_path, "tail_of_tail", "tail"),
        make_job(tmp_path, "unfinished"),
        make_job(tmp_path, "base"),
    ]
    scripts["trunk"] = ["echo 'ConfigError: no such file' >&2; exit 2", FINISH]
    scripts["unfinished"] = ["true"]

    lines: list[str] = []
    outcome = SweepRunner(SWEEP, jobs, side_by_side=1, say=lines.append).run()

    assert order(tmp_path) == ["base"]
    assert outcome.status == 1
    assert [job.run.name for job in outcome.failed] == ["trunk", "unfinished"]
    assert [job.run.name for job in outcome.waiting] == ["tail", "tail_of_tail"]
    (failure,) = [line for line in lines if "ended with status 2" in line]
    assert failure.startswith("trunk seed 1: ended with status 2; the end of ")
    assert failure.endswith("    ConfigError: no such file")
    assert any(line.startswith("unfinished seed 1: ended before its last step") for line in lines)


def test_as_many_runs_as_allowed_are_side_by_side(scripts: Scripts, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    # The first two wait for each other; the third would fail beside them.
    scripts["a"] = ['touch "$0/here"; until [ -e "$0/../b/here" ]; do sleep 0.02; done;' + FINISH]
    scripts["b"] = ['touch "$0/here"; until [ -e "$0/../a/here" ]; do sleep 0.02; done;' + FINISH]
    scripts["c"] = ['[ -e "$0/../a/ended.json" ] || [ -e "$0/../b/ended.json" ] &&' + FINISH]

    jobs = [make_job(tmp_path, name) for name in names]
    outcome = SweepRunner(SWEEP, jobs, side_by_side=2, say=lambda line: None).run()

    assert outcome.status == 0
    assert order(tmp_path)[-1] == "c"


def test_a_stopped_sweep_lets_its_runs_save(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts["a"] = [
        "trap 'touch \"$0/saved\"; exit 0' TERM; echo ready; while :; do sleep 0.02; done"
    ]
    jobs = [make_job(tmp_path, "a"), make_job(tmp_path, "b")]

    def interrupt() -> None:
        if "ready" in (tmp_path / "a/log.txt").read_text().splitlines():
            raise KeyboardInterrupt

    # Looked at between two looks at the runs.
    monkeypatch.setattr(sweep_runner.signals, "received", lambda: None)
    monkeypatch.setattr(SweepRunner, "_look", lambda self: interrupt())
    with pytest.raises(SweepStopped):
        SweepRunner(SWEEP, jobs, side_by_side=1, say=lambda line: None).run()

    assert (tmp_path / "a/saved").exists()
    assert not (tmp_path / "b").exists()


def test_a_run_has_the_cores_that_its_neighbours_leave(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_runner, "num_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    scripts["a"] = ['echo "$OMP_NUM_THREADS" > "$0/threads";' + FINISH]

    SweepRunner(SWEEP, [make_job(tmp_path, "a")], side_by_side=3, say=lambda line: None).run()
    assert (tmp_path / "a/threads").read_text() == "4\n"

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "a/ended.json").unlink()
    SweepRunner(SWEEP, [make_job(tmp_path, "a")], side_by_side=3, say=lambda line: None).run()
    assert (tmp_path / "a/threads").read_text() == "7\n"


def test_a_run_that_another_process_trains_is_waited_for(scripts: Scripts, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "a"), make_job(tmp_path, "b")]
    (tmp_path / "a").mkdir()
    other = (tmp_path / "a/.sweep_lock").open("ab")
    fcntl.flock(other, fcntl.LOCK_EX)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("b seed 1: finished"):
            (tmp_path / "a/ended.json").write_text(json.dumps({"reason": "finished"}))
            other.close()

    outcome = SweepRunner(SWEEP, jobs, side_by_side=1, say=say).run()

    assert order(tmp_path) == ["b"]
    assert [job.run.name for job in outcome.finished] == ["b", "a"]
    assert lines.count("a seed 1: another process trains it; waiting for that") == 1
    assert lines[-1] == "a seed 1: finished by another process"


def test_a_run_that_another_sweep_began_otherwise_is_refused(
    scripts: Scripts, tmp_path: Path
) -> None:
    jobs = [make_job(tmp_path, name) for name in "abc"]
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("a seed 1: finished"):  # another sweep begins b, and ends it
            changed = replace(jobs[1].cfg, training=replace(jobs[1].cfg.training, seed=5))
            write_recipe(SWEEP, replace(jobs[1], cfg=changed))
            (tmp_path / "b/ended.json").write_text(json.dumps({"reason": "finished"}))

    outcome = SweepRunner(SWEEP, jobs, side_by_side=1, say=say).run()

    assert [job.run.name for job in outcome.failed] == ["b"]
    assert order(tmp_path) == ["a", "c"]
    assert any(line.startswith("b seed 1: the recipe has changed since") for line in lines)
    assert not is_locked(tmp_path / "b/.sweep_lock")


def test_a_run_is_locked_while_it_trains(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts["a"] = ['echo ready; read line < "$0/go"; ' + FINISH]
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/go")
    look = SweepRunner._look
    locks: list[bool] = []

    def look_at(runner: SweepRunner) -> None:
        if not locks and "ready" in (tmp_path / "a/log.txt").read_text().splitlines():
            # As if the sweep were killed: the shell has the lock by inheritance.
            runner._running[0].lock.close()
            locks.append(is_locked(tmp_path / "a/.sweep_lock"))
            (tmp_path / "a/go").write_text("go\n")
        look(runner)

    monkeypatch.setattr(SweepRunner, "_look", look_at)
    jobs = [make_job(tmp_path, "a")]
    assert SweepRunner(SWEEP, jobs, side_by_side=1, say=lambda line: None).run().status == 0

    assert locks == [True]
    assert not is_locked(tmp_path / "a/.sweep_lock")


def is_locked(path: Path) -> bool:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
