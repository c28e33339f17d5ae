"""Runs the benchmarks at a toy size, with workers that fail and hang, and counts their work."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import data_wait, moe_layer, train_step
from benchmarks.ceilings import build_ceilings
from benchmarks.digests import Digests
from benchmarks.session import Plan, Session
from benchmarks.shapes import SHAPES, experts_flops, make_routing, moa_flops, resize
from benchmarks.step_peers import make_batch
from benchmarks.workers import Entry, Worker, WorkerError
from moe_ext.counting import training_flops_per_token
from tests.paths import REPO

pytestmark = pytest.mark.usefixtures("forked_workers")

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_experts", "topk"), [(64, 8), (8, 2), (16, 4), (4, 1)])
@pytest.mark.parametrize("kind", ["learned", "balanced", "skewed"])
def test_a_token_has_k_experts_and_as_many_gates(kind: str, num_experts: int, topk: int) -> None:
    made = make_routing(
        kind, num_tokens=128, num_experts=num_experts, topk=topk, rule="topk_softmax"
    )
    assert made.experts.shape == made.gates.shape == (128, topk)
    assert all(len(set(row)) == topk for row in made.experts.tolist())
    assert 0 <= made.experts.min() and made.experts.max() < num_experts
    torch.testing.assert_close(made.gates.sum(dim=1), torch.ones(128))


def counts(kind: str, num_experts: int, topk: int) -> list[int]:
    made = make_routing(
        kind, num_tokens=256, num_experts=num_experts, topk=topk, rule="softmax_topk"
    )
    return sorted(made.experts.flatten().bincount(minlength=num_experts).tolist(), reverse=True)


def test_balanced_routing_gives_each_expert_the_same() -> None:
    assert counts("balanced", 64, 8) == [32] * 64


def test_skewed_routing_sends_half_to_a_sixteenth_of_the_experts() -> None:
    assert counts("skewed", 64, 8)[:4] == [256] * 4  # 4 of 64: half of 256 * 8
    assert counts("skewed", 64, 8)[4] <= 18  # the others share alike
    assert counts("skewed", 8, 2)[0] == 256


def test_learned_routing_matches_the_released_model() -> None:
    """Compares with OLMoE-1B-7B: entropy 3.45 to 3.99 nats, top-8 mass 0.30 to 0.55."""
    made = make_routing("learned", num_tokens=8192, num_experts=64, topk=8, rule="softmax_topk")
    found = made.describe()
    assert 3.45 <= found["mean_entropy"] <= 3.99
    assert 0.30 <= found["mean_selected_mass"] <= 0.55
    assert found["load_balancing_loss"] == pytest.approx(1.14, abs=0.05)
    assert found["mean_selected_mass"] == pytest.approx(made.gates.sum(dim=1).mean().item())


@pytest.mark.parametrize("name", ["olmoe", "jetmoe", "small"])
def test_layer_flops_match_those_of_the_model(name: str) -> None:
    """Compares with the difference of two models that differ by one layer."""
    shape = SHAPES[name]
    model, sizes = shape.model, {"seq_length": None, "micro_batch_size": None}
    one, two = (resize(shape, num_layers=n, **sizes).model for n in (1, 2))
    each = [training_flops_per_token(m, shape.seq_length) for m in (one, two)]
    layer = (each[1] - each[0]) * shape.num_tokens
    h, router = model.hidden_size, (model.num_experts or 0) * model.hidden_size
    small = 2 * h + router
    if model.attention_experts is not None:
        attention = moa_flops(shape)
        small += router + 2 * h  # the attention's router, two output biases
    else:
        per_token = 6 * (4 * h * h + 2 * h) + 12 * h * shape.seq_length
        attention = float(per_token * shape.num_tokens)
    assert layer == experts_flops(shape) + attention + 6 * small * shape.num_tokens


_HOLD_64_MIB = """
import torch
from benchmarks.memory import PeakMemory
meter = PeakMemory(torch.device("cpu"))
meter.restart()
before = meter.peak_bytes()
held = torch.ones(16 * 2**20)
del held
grown = meter.peak_bytes() - before
meter.restart()
print(grown, meter.peak_bytes() - before)
"""


def test_peak_memory_is_the_highest_use() -> None:
    """Runs in a new process, whose allocator no other test has configured."""
    command = [sys.executable, "-c", _HOLD_64_MIB]
    printed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    grown, afterwards = map(int, printed.split())
    assert 0.9 * 2**26 < grown < 1.5 * 2**26
    assert afterwards < 0.5 * 2**26


def test_worker_sends_its_failure_to_the_parent_and_continues() -> None:
    worker = Worker(Entry(build_ceilings, (torch.float32, 16)), device=CPU, num_threads=1)
    try:
        with pytest.raises(RuntimeError, match=re.escape("unknown command 'dance'")):
            worker.call("dance")
        assert worker.call("sample", 0)["flops_per_second"] > 0
    finally:
        worker.close()


def build_broken(device: torch.device) -> Any:
    raise RuntimeError(f"no kernel for {device}\nCompile with the device-side assertions")


def test_failing_peer_is_left_out_by_name_and_a_failing_native_is_not() -> None:
    good, bad = Entry(build_ceilings, (torch.float32, 16)), Entry(build_broken, ())
    common: dict[str, Any] = {
        **{"device": CPU, "dtype": torch.float32},
        **{"rounds": 1, "warmup": 0, "gemm_size": 16},
    }
    session = Session(Plan(entries={"native": good, "peer": bad}, is_fresh=True, **common))
    session._visit("peer")
    assert session.found["peer"].failed == "RuntimeError: no kernel for cpu"
    assert session._present() == ["native"]
    assert session.exit_status == 0
    with pytest.raises(WorkerError, match="no kernel for cpu"):
        Session(Plan(entries={"native": bad}, is_fresh=True, **common))._visit("native")


class Idle:
    """Computes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def check(self) -> tuple[float, Digests]:
        return 0.0, {}

    def sample(self, number: int) -> dict[str, float]:
        return {"seconds": 1.0}

    def release(self) -> None:
        pass


def test_an_own_backend_that_fails_is_named_and_the_session_goes_on_to_status_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan(
        entries={"native": Entry(Idle, ()), "native:b": Entry(build_broken, ())}, device=CPU,
        dtype=torch.float32, rounds=1, warmup=0, gemm_size=16, is_fresh=True,
    )  # fmt: skip
    session = Session(plan)
    session._compare()
    assert session._present() == ["native"]
    assert session.found["native:b"].failed == "RuntimeError: no kernel for cpu"
    assert "native:b is left out: a worker failed during 'check'" in capsys.readouterr().err
    assert session.exit_status == 1


class Hanging(Idle):
    """Starts a process that would outlive it, and never ends a sample."""

    def __init__(self, device: torch.device, fifo: str) -> None:
        super().__init__(device)
        script = f"exec sleep 3600 > {shlex.quote(fifo)}"
        self._child = subprocess.Popen(["sh", "-c", script])

    def sample(self, number: int) -> dict[str, float]:
        threading.Event().wait()
        raise AssertionError


def test_peer_that_hangs_is_killed_with_what_it_started_and_left_out(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    plan = Plan(
        entries={"peer": Entry(Hanging, (str(fifo),))}, device=CPU, dtype=torch.float32,
        rounds=1, warmup=0, gemm_size=16,
    )  # fmt: skip
    session = Session(plan)
    with session._worker("peer") as worker:
        assert worker.call("check") == (0.0, {})
    session._plan = dataclasses.replace(plan, peer_timeout_s=0.01)
    with fifo.open("rb") as written:  # opens when the grandchild has
        session._visit("peer")
        assert written.read() == b""  # ends when the grandchild has
    assert session.found["peer"].failed == "'sample' took more than 0.01 s"
    assert not session._persistent


def test_fresh_session_keeps_no_worker() -> None:
    entries = {"native": Entry(build_ceilings, (torch.float32, 16))}
    plan = Plan(
        entries=entries, device=CPU, dtype=torch.float32, rounds=1, warmup=1, gemm_size=16,
        is_fresh=True,
    )  # fmt: skip
    session = Session(plan)
    session.run()
    assert list(session._persistent) == ["ceilings"]
    (sample,), peak = session.found["native"].samples, session.found["native"].peak_bytes
    assert sample["seconds"] > 0
    assert peak is not None and peak > 2 * 2**28  # it holds what it copies and the copy


def test_tokens_follow_zipfs_law() -> None:
    shape = resize(SHAPES["small"], num_layers=None, seq_length=4096, micro_batch_size=8)
    batch = make_batch(shape, 0, CPU)
    share = (batch.tokens == 0).double().mean().item()
    vocabulary = shape.model.vocab_size
    # The integral of 1 / x from 1 to 2 over that from 1 to v + 1; 32,768 draws.
    assert share == pytest.approx(math.log(2) / math.log(vocabulary + 1), rel=0.1)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert not torch.equal(batch.tokens, make_batch(shape, 1, CPU).tokens)


def run(main: Any, path: Path, *flags: str) -> dict[str, Any]:
    common = ["--rounds", "2", "--warmup", "1", "--threads", "1", "--gemm-size", "32"]
    assert main([*common, "--json", str(path), *flags]) == 0
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def check_rows(found: dict[str, Any], *names: str) -> None:
    """Check that all rows exist and that their ratios follow from their samples."""
    rows = found["implementations"]
    for name in names:
        row = rows[name]
        assert row["status"] == "measured"
        assert row["gradient_difference"] < 2e-3
        assert row["peak_bytes"] > 0
        ratios = [a / b for a, b in zip(row["seconds"], rows["native"]["seconds"], strict=True)]
        assert row["time_over_native"]["median"] == pytest.approx(sum(ratios) / 2)
        assert row["tokens_per_second"]["high"] == pytest.approx(32 / min(row["seconds"]))


def test_layer_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("native", "transformers-eager")
    flags = ("--shape", "jetmoe_toy", "--routing", "skewed")
    absent = ("scattermoe", "sonicmoe")
    found = run(moe_layer.main, tmp_path / "a.json", *flags, "--only", *names, *absent)
    check_rows(found, *names)
    for name in absent:
        assert found["implementations"][name] == {"status": f"not installed: {name}"}
    assert found["routing"]["max_load_ratio"] == 4.0  # half of the assignments on 1 of 8
    assert "| native |" in capsys.readouterr().out


def test_attention_benchmark_runs(tmp_path: Path) -> None:
    names = ("native", "transformers-sdpa")
    flags = ("--shape", "jetmoe_toy", "--block", "attention", "--only", *names)
    check_rows(run(moe_layer.main, tmp_path / "a.json", *flags), *names)


def test_step_benchmark_runs_and_losses_agree(tmp_path: Path) -> None:
    names = ("native", "transformers-grouped_mm")
    flags = ("--shape", "olmoe_toy", "--only", *names)
    found = run(train_step.main, tmp_path / "a.json", *flags)
    check_rows(found, *names)
    # The second and third step: the first warmed up.
    first, second = (found["losses"][name] for name in names)
    assert first == pytest.approx(second, abs=1e-4)
    assert first[0] != first[1]


def test_unknown_implementation_and_wrong_block_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=re.escape("unknown implementation natve; use native,")):
        train_step.main(["--shape", "olmoe_toy", "--only", "natve"])
    with pytest.raises(SystemExit):
        moe_layer.main(["--shape", "olmoe_toy", "--block", "attention"])
    assert "olmoe_toy has no attention experts; use jetmoe" in capsys.readouterr().err


def test_data_wait_has_a_figure_for_every_step_of_every_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--tokens", "5000", "--global-batch-size", "8", "--seq-length", "16"]
    steps = ["--data-parallel", "1", "2", "--steps", "3", "--step-s", "0"]
    written = tmp_path / "waits.json"
    data_wait.main([*sizes, *steps, "--work", str(tmp_path), "--json", str(written)])
    found = json.loads(written.read_text())
    kinds = [(each["data_parallel"], each["num_workers"]) for each in found]
    assert kinds == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(len(each["later_s"]) == 3 and min(each["later_s"]) > 0 for each in found)
    middle = sorted(found[3]["later_s"])[1] * 1e3
    assert f"| 2 | 1 | {found[3]['first_s'] * 1e3:.1f} | {middle:.2f} (" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [written]
