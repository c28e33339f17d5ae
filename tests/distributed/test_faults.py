"""Ranks killed and told to stop at every kind of moment, a full disk, two jobs in one directory.

docs/reliability.md has the promises. The ranks are real processes on gloo; the losses of every
patched-together run are compared, bit for bit, with those of one that was left alone.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.records.record_file import read_records
from tests.distributed.launcher import (
    HERE,
    REPO,
    alone,
    flags,
    program,
    rank_environment,
    ranks,
    run_session,
)

STEPS, SAVE_EVERY = 12, 3
PLAN: dict[str, Any] = {
    "num_layers": 2,
    "global_batch_size": 4,
    "train_iters": STEPS,
    "lr_warmup_iters": 4,
    "eval_interval": 4,
    "eval_iters": 2,
    "expert_model_parallel_size": 2,
    "save_interval": SAVE_EVERY,
    "no_tensorboard": True,
}


def run_flags(run: Path, **overrides: Any) -> list[str]:
    return flags(**{**PLAN, **overrides}, save=run, load=run)


def attempts(plan: list[dict[str, Any]], where: Path) -> list[dict[str, Any]]:
    """Run attempts one after another; what faults_worker.py says of each."""
    file = where / "plan.json"
    file.write_text(json.dumps(plan))
    done = alone(HERE / "faults_worker.py", str(file), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def figures(run: Path) -> dict[tuple[int, str], Any]:
    """Every loss of a run, by iteration and kind."""
    found: dict[tuple[int, str], Any] = {}
    for record in read_records(run / "metrics.jsonl"):
        for key in ("lm_loss", "grad_norm", "valid_loss"):
            if key in record:
                assert (record["iteration"], key) not in found
                found[record["iteration"], key] = record[key]
    return found


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_records(run / "events.jsonl") if event["event"] == name]


def ended(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "ended.json").read_text())
    return found


KILLS: list[dict[str, Any]] = [
    *({"stage": "step", "iteration": done} for done in (0, 2, 4, 7, 8)),
    *({"stage": "evaluation", "iteration": done} for done in (8, 8)),
    *({"stage": "save", "iteration": done} for done in (9, 12)),
]
NOTICES: list[dict[str, Any]] = [
    {"stage": "data", "signal": "SIGUSR1", "rank": 1, "ends_at": 0},
    {"stage": "step", "iteration": 1, "signal": "SIGTERM", "rank": 0, "ends_at": 2},
    {"stage": "evaluation", "iteration": 4, "signal": "SIGUSR1", "rank": 1, "ends_at": 4},
    {"stage": "save", "iteration": 9, "signal": "SIGTERM", "rank": 1, "ends_at": 9},
    {"stage": "evaluation", "iteration": STEPS, "signal": "SIGUSR1", "rank": 0, "ends_at": STEPS},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Every forked attempt of this file, in one process that imports once."""
    where = tmp_path_factory.mktemp("faults")
    plan: list[dict[str, Any]] = []
    names: list[str] = []

    def add(name: str, fault: dict[str, Any] | None = None, **overrides: Any) -> None:
        names.append(name)
        log = str(where / f"{name}.log{names.count(name)}")
        run = overrides.pop("run", where / name)
        plan.append({"flags": run_flags(run, **overrides), "log": log, "fault": fault})

    add("whole")
    moments = random.Random(11)
    for number, kill in enumerate(KILLS):
        after = round(moments.uniform(0.0, 0.05), 3)
        add("killed", {"kind": "kill", "rank": number % 2, "after": after, **kill})
    add("killed")
    for notice in NOTICES:
        add("told", {"kind": "signal", **notice}, requeue_exit_code=75)
    add("told", requeue_exit_code=75)
    add("two", {"kind": "fork", "rank": 0, "stage": "step", "iteration": 2})
    done = attempts(plan, where)
    yield {
        "where": where,
        "outcomes": {
            name: [each for other, each in zip(names, done, strict=True) if other == name]
            for name in dict.fromkeys(names)
        },
    }


def log_of(runs: dict[str, Any], name: str) -> str:
    return "\n".join(path.read_text() for path in sorted(runs["where"].glob(f"{name}.log*")))


def test_run_that_is_left_alone_finishes(runs: dict[str, Any]) -> None:
    assert runs["outcomes"]["whole"][0]["codes"] == [0, 0], log_of(runs, "whole")[-3000:]
    run = runs["where"] / "whole"
    assert ended(run) | {"time": ""} == {
        "reason": "finished",
        "detail": "",
        "iteration": STEPS,
        "train_iters": STEPS,
        "saved_iteration": STEPS,
        "requeue": False,
        "time": "",
    }
    assert [key[0] for key in figures(run) if key[1] == "valid_loss"] == [4, 8, 12]


def test_rank_killed_at_any_moment_costs_at_most_one_save_interval(runs: dict[str, Any]) -> None:
    run = runs["where"] / "killed"
    outcomes = runs["outcomes"]["killed"]
    for number, outcome in enumerate(outcomes[:-1]):
        codes = outcome["codes"]
        log = runs["where"] / f"killed.log{number + 1}"
        assert codes[number % 2] == -9, (number, outcome, log.read_text()[-3000:])
        # The other rank ends by itself, and not well: nobody has to come and look.
        assert codes[1 - number % 2] not in (0, None), (number, outcome)
    assert outcomes[-1]["codes"] == [0, 0], log_of(runs, "killed")[-3000:]
    assert figures(run) == figures(runs["where"] / "whole")
    # Where each attempt was killed, and where the next one began.
    begun = [
        event["iteration"]
        for event in read_records(run / "events.jsonl")
        if event["event"] in ("start", "resume")
    ]
    assert len(begun) == len(outcomes)
    for kill, next_begin in zip(KILLS, begun[1:], strict=True):
        assert kill["iteration"] - next_begin <= SAVE_EVERY


def test_notice_at_any_moment_stops_all_ranks_with_everything_saved(runs: dict[str, Any]) -> None:
    run = runs["where"] / "told"
    outcomes = runs["outcomes"]["told"]
    for outcome in outcomes[:-1]:
        assert outcome["codes"] == [75, 75], log_of(runs, "told")[-4000:]
    assert outcomes[-1]["codes"] == [0, 0]
    ends = events(run, "end")
    assert [(event["iteration"], event["detail"]) for event in ends] == [
        *((notice["ends_at"], f"signal: {notice['signal']} received") for notice in NOTICES),
        (STEPS, "finished"),
    ]
    assert figures(run) == figures(runs["where"] / "whole")
    log = log_of(runs, "told")
    assert "run ended: SIGUSR1 received, iteration 4 of 12; checkpoint of iteration 4 in" in log
    assert "not finished, start it again with --load to go on" in log


def test_second_job_in_a_run_directory_is_refused(runs: dict[str, Any]) -> None:
    where = runs["where"]
    assert runs["outcomes"]["two"][0]["codes"] == [0, 0]
    assert (where / "two.log1.status").read_text() == "2"
    told = (where / "two.log1.second").read_text()
    assert re.search(r"ConfigError: --save \S+/two is in use by process \d+ on \S+ since", told)
    assert figures(where / "two") == figures(where / "whole")


def test_torchrun_restarts_after_a_kill_and_passes_over_a_damaged_checkpoint(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    """The whole chain as a user has it, on torchrun's own restarts."""
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"),
        *("--nproc-per-node", "2", *program(HERE / "faults_restart_worker.py"), str(tmp_path)),
        *run_flags(run),
    ]
    done = run_session(command, rank_environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "killed").exists()
    passed_over = events(run, "fallback")
    assert [event["iteration"] for event in passed_over] == [3]
    assert passed_over[0]["detail"].startswith("iter_0000006: ")
    assert [event["iteration"] for event in events(run, "resume")] == [3]
    assert figures(run) == figures(runs["where"] / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and a half."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_full_disk_leaves_the_checkpoint_before_and_a_clear_word(
    runs: dict[str, Any], small_disk: Path
) -> None:
    run = small_disk / "run"
    script = REPO / "tools" / "pretrain.py"
    done = ranks(2, script, *run_flags(run))
    assert done.returncode != 0
    assert re.search(
        r"CheckpointError: could not save iteration \d+ to \S+: .*No space left on device.*;"
        r" the checkpoints that were there before are untouched",
        done.stderr,
    ), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    kept = sorted(path.name for path in run.glob("iter_*"))
    assert kept and all("." not in name for name in kept), kept
    assert len(kept) < STEPS // SAVE_EVERY
    # With room again, it goes on as if nothing had been.
    remount = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(remount, check=True)
    done = ranks(2, script, *run_flags(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert figures(run) == figures(runs["where"] / "whole")
