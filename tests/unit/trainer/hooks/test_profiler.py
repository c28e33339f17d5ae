"""A profile holds the operations of its steps and no others, and changes nothing."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.schema import ProfilingConfig
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.profiler import HOST_READ, Profiler, describe_operations
from megatron.trainer.loop import train
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

StateMaker = Callable[..., TrainState]


class Losses(Hook):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, iteration: int, loss: float) -> None:
        self.found.append(loss)


def run(make_state: StateMaker, *hooks: Hook, **flags: Any) -> list[float]:
    losses = Losses()
    small = {"train_iters": 6, "num_layers": 1, "global_batch_size": 2}
    train(make_state(**small, **flags), NEXT_TOKEN, hooks=[*hooks, losses])
    return losses.found


def profiler(directory: Path, *, start: int = 2, end: int = 4) -> Profiler:
    cfg = ProfilingConfig(profile=True, profile_step_start=start, profile_step_end=end)
    return Profiler(cfg, directory, rank=0)


def events_of(directory: Path) -> list[dict[str, Any]]:
    """What the trace holds that has a length."""
    with gzip.open(directory / "trace.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def named(events: list[dict[str, Any]], pattern: str) -> list[dict[str, Any]]:
    return [event for event in events if re.fullmatch(pattern, event["name"])]


def test_profile_holds_its_steps_and_no_others(make_state: StateMaker, tmp_path: Path) -> None:
    directory = tmp_path / "rank0"
    losses = run(make_state, profiler(directory))
    events = events_of(directory)
    steps = named(events, r"(step|save|evaluation) \d+")
    assert [step["name"] for step in steps] == ["step 3", "step 4"]
    operations = named(events, "aten::.*")
    first, last = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    within = [e for e in operations if first <= e["ts"] and e["ts"] + e["dur"] <= last + 1]
    assert within == operations
    counts = [
        Counter(e["name"] for e in operations if step["ts"] <= e["ts"] < step["ts"] + step["dur"])
        for step in steps
    ]
    # Each step multiplies as often as the other; a backward pass is in it too.
    assert counts[0]["aten::mm"] == counts[1]["aten::mm"] > 10

    text = (directory / "operations.txt").read_text()
    assert text.startswith("iterations 3 to 4 on rank 0, ")
    syncs = len(named(events, HOST_READ))
    assert syncs > 0
    assert f"host synchronisations: {syncs}, {syncs / 2:g} a step\n" in text
    rows = re.findall(r"^ +([\d.]+) +[\d.]+% +(\d+) +[\d.]+  (\S.*)$", text, re.MULTILINE)
    assert len(rows) == 30
    times = [float(own_ms) for own_ms, _, _ in rows]
    assert times == sorted(times, reverse=True)
    calls = {name: int(count) for _, count, name in rows}
    assert calls["aten::mm"] == 2 * counts[0]["aten::mm"]

    assert losses == run(make_state), "bit for bit"


def test_what_comes_between_the_steps_has_its_own_name(
    make_state: StateMaker, tmp_path: Path
) -> None:
    run(make_state, profiler(tmp_path), eval_interval=3, eval_iters=2, split="80,20")
    names = [event["name"] for event in named(events_of(tmp_path), r"(step|evaluation) \d+")]
    assert names == ["step 3", "evaluation 4", "evaluation 4", "step 4"]


def test_run_that_ends_before_the_last_step_leaves_its_profile(
    make_state: StateMaker, tmp_path: Path
) -> None:
    run(make_state, profiler(tmp_path, start=5, end=99))
    steps = named(events_of(tmp_path), r"step \d+")
    assert [step["name"] for step in steps] == ["step 6"]
    assert "iterations 6 to 6 on rank 0" in (tmp_path / "operations.txt").read_text()


def test_profile_that_cannot_be_written_does_not_end_the_run(
    make_state: StateMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = tmp_path / "profile"
    taken.write_text("a file")
    assert len(run(make_state, profiler(taken))) == len(run(make_state))
    assert f"the profile cannot be written to {taken}: " in caplog.text


def test_run_that_has_passed_the_steps_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = profiler(tmp_path / "rank0")
    hook.on_start(4, 10)
    hook.on_stage("step", 5)
    hook.on_step(5, 1.0)
    hook.on_end()
    assert "nothing is profiled: the run stands at iteration 4, --profile-step-end is 4" in (
        caplog.text
    )
    assert list(tmp_path.iterdir()) == []


def event(name: str, ts: float, dur: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


def test_operations_are_summed_up_without_their_children() -> None:
    events = [
        event("outer", 0, 10_000),
        event("inner", 1000, 3000),
        event("leaf", 2000, 1000),
        event("inner", 5000, 2000),
        event("inner", 4000, 7000, tid=2),  # of another thread, while outer runs
        event("outer", 10_000, 500),
        event("cudaStreamSynchronize", 10_500, 250, "cuda_runtime"),
        event("gemm", 0, 4000, "kernel", tid=7),
        event("not an operation", 0, 9000, "python_function"),
    ]
    lines = describe_operations(events, num_steps=2)
    assert lines[:2] == ["host synchronisations: 1, 0.5 a step", "       1 cudaStreamSynchronize"]
    table = [line.split() for line in lines if line.endswith(("outer", "inner", "leaf", "gemm"))]
    assert [(row[4], row[0], row[2]) for row in table] == [
        ("gemm", "4.000", "1"),
        ("inner", "11.000", "3"),
        ("outer", "5.500", "2"),
        ("leaf", "1.000", "1"),
    ]
    assert table[0][1] == "100.0%" and table[1][3] == "3666.7"
