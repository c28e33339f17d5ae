"""Runs the scaling benchmark at toy sizes, and compares its arithmetic with references."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from benchmarks.collectives import recording
from benchmarks.scaling import cli, whole_runs
from benchmarks.scaling.plots import plot_processes
from benchmarks.scaling.points import BLOCK, points
from benchmarks.scaling.processes import PROCESS_BLOCK, _compare_losses, layout_flags
from benchmarks.session import DifferentMathsError
from moe_app.pretrain.config import parse_recipe
from moe_ext.counting import count_parameters, training_flops_per_token
from tests.paths import REPO

pytestmark = pytest.mark.usefixtures("forked_workers")


def test_finer_experts_change_only_the_cost_of_the_router() -> None:
    shapes = points("experts", BLOCK, (8, 64, 256))
    assert [shape.model.moe_router_topk for shape in shapes.values()] == [1, 8, 32]
    assert [shape.model.moe_ffn_hidden_size for shape in shapes.values()] == [1536, 192, 48]
    for value, shape in shapes.items():
        router = 2 * 384 * (value - 64)
        assert count_parameters(shape.model).total - router == count_parameters(BLOCK.model).total
        flops = training_flops_per_token(shape.model, 256) - 6 * router
        assert flops == training_flops_per_token(BLOCK.model, 256)
    with pytest.raises(SystemExit, match=re.escape("12 experts cannot be made of 64 with top-8")):
        points("experts", BLOCK, (12,))


def test_tokens_are_whole_sequences() -> None:
    (shape,) = points("tokens", BLOCK, (1024,)).values()
    assert (shape.num_tokens, shape.seq_length) == (1024, BLOCK.seq_length)
    with pytest.raises(SystemExit, match=re.escape("use multiples of 256")):
        points("tokens", BLOCK, (300,))


def test_flags_give_the_shape_and_the_layout() -> None:
    cfg = parse_recipe(layout_flags(PROCESS_BLOCK, 4, "PP"), prog="test", description="")
    assert cfg.model == PROCESS_BLOCK.model
    assert cfg.parallel.pipeline_model_parallel_size == 4
    assert cfg.training.global_batch_size == PROCESS_BLOCK.micro_batch_size
    assert cfg.training.seq_length == PROCESS_BLOCK.seq_length


def test_layouts_with_different_losses_are_refused() -> None:
    same: list[list[dict[str, Any]]] = [[{"loss": 2.0}]]
    _compare_losses({"1": same, "EP2": same})
    with pytest.raises(DifferentMathsError, match=re.escape("the first loss under EP2 is 2.1")):
        _compare_losses({"1": same, "EP2": [[{"loss": 2.1}]]})


def test_recording_restores_torch() -> None:
    before = {name: vars(ProcessGroup)[name] for name in ("allreduce", "barrier", "send")}
    with recording({}) as calls:
        assert vars(ProcessGroup)["allreduce"] is not before["allreduce"]
    assert {name: vars(ProcessGroup)[name] for name in before} == before
    assert not calls


def run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    file = tmp_path / "found.json"
    common = ["--json", str(file), "--plot-dir", str(tmp_path), "--rounds", "2"]
    assert cli.main([*common, *flags]) == 0
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    png = (tmp_path / f"scaling_{found['sweep']}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    return found


def test_table_of_the_document_is_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--sweep", "model")
    document = (REPO / "docs" / "scaling.md").read_text("utf-8")
    assert capsys.readouterr().out in document
    by_gpus = {(row["gpus"], row["layout"]["expert"]): row for row in found["rows"]}
    assert min(by_gpus) == (8, 8) and max(by_gpus) == (1024, 64)
    for row in by_gpus.values():
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
        assert row["tokens"] * row["gpus"] == 1024 * 4096
    slow, fast = (
        run(tmp_path, "--sweep", "model", "--gpu-tflops", rate, "--values", "8", "--ep", "8")
        for rate in ("400", "800")
    )
    compute = fast["rows"][0]["seconds"]["compute"]
    assert compute == pytest.approx(slow["rows"][0]["seconds"]["compute"] / 2)


def test_row_of_a_whole_run_is_what_the_command_prints() -> None:
    losses = whole_runs.Losses(restart_s=600, save_s=10)
    jetmoe = whole_runs.PAPERS[1]
    one = ("--tp", "1", "--cp", "1", "--ep", "1")
    flags = ("--expert-backend", "grouped", *one)
    row = whole_runs.describe(jetmoe, 96, 1024, flags, losses, 2.0)
    printed = whole_runs.table([row]).splitlines()[-1]
    assert f"\n{printed}\n" in (REPO / "docs" / "scaling.md").read_text("utf-8")
    assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
    assert row["rate"] * 96 * row["step_seconds"] == pytest.approx(1024 * 4096)
    taken_s = jetmoe.tokens / (1024 * 4096) * row["step_seconds"]
    assert row["days"] * 86400 * (1 - row["lost_share"]) == pytest.approx(taken_s)
    assert row["dollars"] == pytest.approx(2 * 96 * 24 * row["days"])
    none = whole_runs.describe(jetmoe, 96, 1024, (*flags, "--memory", "1"), losses, 2.0)
    assert "none fits" in whole_runs.table([none])


def test_time_between_saves_loses_least() -> None:
    losses = whole_runs.Losses(restart_s=600, save_s=10)
    between = whole_runs.mean_time_between(10240)
    assert between / 3600 == pytest.approx(54 * 24 / 419 * 16384 / 10240)
    lost = {every: 10 / every + (600 + every / 2) / between for every in range(10, 5000)}
    best = min(lost, key=lambda every: lost[every])
    assert losses.interval_s(10240) == pytest.approx(best, abs=1)
    assert losses.share(10240) == pytest.approx(lost[best], rel=1e-3)


def test_points_are_measured_beside_the_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = ("--shape", "olmoe_toy", "--values", "16", "--warmup", "1", "--threads", "1")
    found = run(tmp_path, "--sweep", "tokens", *toy, "--gemm-size", "32")
    (point,) = found["points"]
    native, peer = (
        point["implementations"][name]["seconds"] for name in ("native", "transformers-grouped_mm")
    )
    assert len(native) == len(peer) == 2
    ratios = [a / b for a, b in zip(peer, native, strict=True)]
    assert point["peer_time_over_native"]["median"] == pytest.approx(sum(ratios) / 2)
    printed = capsys.readouterr().out
    assert "| tokens | native: ms | GB | transformers-grouped_mm: ms | GB |" in printed


def test_more_processes_than_cores_are_plotted(tmp_path: Path) -> None:
    summary = {"median": 1.0, "low": 0.9, "high": 1.2}
    row = {"speedup": summary, "tokens_per_second": summary, "wire_bytes": 1e6}
    found = {
        "title": "a title", "processes": [1, 2, 4], "machine": {"cpu_count": 2},
        "layouts": {
            "1": {**row, "processes": 1, "kind": ""},
            "DP2": {**row, "processes": 2, "kind": "DP"},
            "DP4": {**row, "processes": 4, "kind": "DP"},
        },
    }  # fmt: skip
    plot_processes(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
