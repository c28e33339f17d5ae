"""Tests the tables, figures and pages that are made of what runs recorded."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.cli import dump_config
from megatron.trainer.errors import ConfigError
from moe_app.ablate.ablate_command import main
from moe_app.ablate.studies_file import Branch, Run, Study
from moe_app.ablate.study_figures import COLOURS, band_of, draw_study, panels_of
from moe_app.ablate.sweep_export import commit_of
from moe_app.ablate.sweep_jobs import SweepJob
from moe_app.ablate.sweep_tables import (
    Point,
    Trained,
    averaged,
    measure,
    read_tables,
    write_tables,
)
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.counting import training_flops_per_token
from tests.unit.app.ablate.conftest import RECIPE, RUNS, WriteStudies

STUDY = Study(
    name="s", title="S", source="", runs={"base": "with $", "other": "without"}, better="base"
)


def write_run(
    directory: Path,
    cfg: PretrainConfig,
    losses: Sequence[float | None],
    *,
    valid: Sequence[float | None] = (),
    speed: float = 64.0,
    first: int = 1,
) -> None:
    """Write the records of a run whose steps have 64 tokens, with an evaluation after the last."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump_config(cfg))
    (directory / "ended.json").write_text(json.dumps({"reason": "finished"}))
    records: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, start=first):
        at = {"iteration": number, "consumed_tokens": 64 * number}
        records.append({**at, "lm_loss": loss, "tokens_per_second": speed, "global_batch_size": 4})
    if valid:
        sets = {f"set{number}": loss for number, loss in enumerate(valid)}
        accuracy = {"task_accuracy": {"next_word": {"char": 0.25, "none": 0.5}}}
        records.append({**at, "valid_loss": sets, **accuracy})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """The settings of the recipe of these tests."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return parse_recipe(["--config", str(path)], prog="test", description="")


def job_of(directory: Path, cfg: PretrainConfig, branch: Branch | None = None) -> SweepJob:
    return SweepJob(
        run=Run(name=directory.name, recipe="", anneal_from=branch),
        seed=3,
        cfg=cfg,
        directory=directory,
        source=None,
        ranks=1,
    )


def test_a_run_is_measured_by_its_records(tmp_path: Path, cfg: PretrainConfig) -> None:
    losses = [5.0 - 0.01 * step for step in range(200)]
    write_run(tmp_path / "base", cfg, losses, valid=[3.0, 4.0], speed=128.0)

    found = measure(job_of(tmp_path / "base", cfg), None)

    per_token = training_flops_per_token(cfg.model, cfg.training.seq_length)
    assert (found.run, found.seed, found.tokens) == ("base", 3, 64 * 200)
    assert found.flops == per_token * 64 * 200
    assert found.flops_at(64) == pytest.approx(per_token * 64)
    assert found.seconds == pytest.approx(200 * 64 / 128)
    # The last 2 % of 200 steps.
    assert found.final["train"] == pytest.approx(sum(losses[-4:]) / 4)
    assert {key: found.final[key] for key in found.final if key != "train"} == {
        "valid": 3.5,
        "valid set0": 3.0,
        "valid set1": 4.0,
        "task next_word": 0.25,
    }
    assert len(found.curves["train"]) == 200
    assert found.curves["train"][9] == Point(tokens=640, seconds=5.0, value=losses[9])
    assert found.curves["valid"] == [Point(tokens=64 * 200, seconds=100.0, value=3.5)]


def test_a_branch_has_the_tokens_and_seconds_of_its_trunk(
    tmp_path: Path, cfg: PretrainConfig
) -> None:
    write_run(tmp_path / "trunk", cfg, [5.0] * 10, speed=32.0)
    write_run(tmp_path / "tail", cfg, [4.0] * 5, speed=64.0, first=7)

    trunk = measure(job_of(tmp_path / "trunk", cfg), None)
    branch = Branch(run="trunk", iteration=6)
    tail = measure(job_of(tmp_path / "tail", cfg, branch), trunk)

    assert trunk.seconds == pytest.approx(20)
    assert tail.tokens == 11 * 64
    assert tail.seconds == pytest.approx(6 * 2 + 5 * 1)


def test_the_final_loss_of_a_branch_is_that_of_its_own_last_steps(
    tmp_path: Path, cfg: PretrainConfig
) -> None:
    write_run(tmp_path / "trunk", cfg, [5.0] * 1000)
    write_run(tmp_path / "tail", cfg, [4.0] * 17 + [1.0, 2.0, 3.0], first=1001)

    trunk = measure(job_of(tmp_path / "trunk", cfg), None)
    tail = measure(job_of(tmp_path / "tail", cfg, Branch(run="trunk", iteration=1000)), trunk)

    assert tail.final["train"] == pytest.approx(2.0)


def test_long_curves_are_averaged() -> None:
    points = [Point(tokens=at, seconds=2.0 * at, value=float(at)) for at in range(1, 402)]

    found = averaged(points, 200)

    assert len(found) == 134
    assert found[0] == Point(tokens=3, seconds=6.0, value=2.0)
    assert found[-1] == Point(tokens=401, seconds=802.0, value=400.5)


def make_trained(run: str, seed: int, values: Sequence[float], flops: float = 3.0) -> Trained:
    curve = [
        Point(tokens=100.0 * at, seconds=1.5 * at, value=value)
        for at, value in enumerate(values, start=1)
    ]
    return Trained(
        run=run,
        seed=seed,
        tokens=100.0 * len(values),
        flops=flops * 100 * len(values),
        seconds=1.5 * len(values),
        final={"train": values[-1], "valid": values[-1] + math.pi},
        curves={"train": curve, "valid docs": curve[-2:]},
    )


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    runs = [
        make_trained("base", 1, [3.0, 2.5, 2.25]),
        make_trained("base", 2, [3.5, 2.0, 1.5]),
        make_trained("other", 1, [4.0, 3.0, 2.0]),
    ]

    write_tables(tmp_path, runs)

    assert read_tables(tmp_path) == runs
    (tmp_path / "curves/other.csv").write_text("seed,curve\n1,train\n")
    with pytest.raises(ConfigError, match=r"other.csv cannot be read: its first line must be seed"):
        read_tables(tmp_path)


def test_a_band_spans_the_seeds() -> None:
    runs = [
        make_trained("base", 1, [4.0, 3.0, 2.0], flops=2),
        make_trained("base", 2, [5.0, 3.5], flops=2),
    ]

    band = band_of(runs, "train")

    assert band is not None
    assert band.tokens == (100, 200)
    assert band.flops == (200, 400)
    assert (band.mean, band.low, band.high) == ((4.5, 3.25), (4, 3), (5, 3.5))
    assert band_of(runs, "task none") is None


def test_a_figure_has_a_panel_for_each_loss_and_task() -> None:
    runs = [make_trained("base", 1, [4.0, 3.0, 2.0]), make_trained("other", 1, [5.0, 4.0, 3.0])]
    runs[0] = replace(runs[0], curves={**runs[0].curves, "task t": runs[0].curves["train"]})

    panels = panels_of(STUDY, [*runs, make_trained("third", 1, [1.0])])

    assert {metric: list(bands) for metric, bands in panels.items()} == {
        "train": ["base", "other"],
        "valid docs": ["base", "other"],
        "task t": ["base"],
    }


def test_a_figure_is_small_and_keeps_the_colours() -> None:
    image_module = pytest.importorskip("PIL.Image")
    runs = [
        replace(run, curves={f"valid {number}": run.curves["train"] for number in range(6)})
        for name, first in (("base", 4.0), ("other", 5.0))
        for seed in (1, 2, 3)
        for run in [make_trained(name, seed, [first + math.sin(seed * at) for at in range(200)])]
    ]

    png = draw_study(STUDY, runs)

    assert png is not None
    assert len(png) < 100_000
    pixels = image_module.open(io.BytesIO(png)).convert("RGB")
    drawn = [pixel for _, pixel in pixels.getcolors(1 << 24)]
    for colour in COLOURS[:2]:
        wanted = bytes.fromhex(colour[1:])
        assert min(math.dist(pixel, wanted) for pixel in drawn) < 14, colour
    assert draw_study(STUDY, []) is None


def test_a_report_is_made_again_of_what_was_exported(
    write_studies: WriteStudies,
    tmp_path: Path,
    cfg: PretrainConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    studies = """\
  - name: balancing
    title: Load <balancing>
    source: OLMoE, Figure 9
    runs: {base: with, no_balancing: without}
    better: base
    published: {valid: {base: 3.712, no_balancing: 3.788}, tokens_ratio: 3}
"""
    path = str(write_studies(studies=studies))
    output, exported = tmp_path / "out", tmp_path / "exported"
    for seed in (1, 2):
        for run, loss in (("base", 3.0), ("no_balancing", 3.1 + 0.01 * seed)):
            directory = output / "runs" / run / f"seed_{seed}"
            write_run(directory, cfg, [5.0, 4.0, loss], valid=[loss])

    assert main([path, "--output", str(output), "--report-only", "--export", str(exported)]) == 0
    made = {each.name: each.read_bytes() for each in (output / "report").rglob("*.*")}
    assert {each.name for each in (exported / "report").rglob("*.*")} == made.keys() - {
        "index.html"
    }
    for name in ("signs.csv", "signs.md", "equal_loss.csv", "balancing.png"):
        (exported / "report" / name).unlink()
    assert main([path, "--output", str(exported), "--report-only"]) == 0

    again = {each.name: each.read_bytes() for each in (exported / "report").rglob("*.*")}
    assert again == made
    (sign,) = [
        line
        for line in csv.DictReader(io.StringIO(made["signs.csv"].decode()))
        if line["decides"] == "yes"
    ]
    assert (sign["published"], sign["ours"], sign["seeds"]) == ("0.076", "0.115", "2")
    assert sign["verdict"] == "agrees"
    page = made["index.html"].decode()
    assert "Load &lt;balancing&gt;" in page
    assert "1 agrees, 0 disagrees, 0 undecided" in page
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["command"].startswith("python tools/ablate.py ")
    assert len(manifest["finished"]) == 4
    kept = parse_recipe(
        ["--config", str(exported / "recipes/no_balancing.yaml")], prog="test", description=""
    )
    assert kept.model.moe_aux_loss_coeff == 0.0
    assert (exported / "studies.yaml").read_text() == Path(path).read_text()
    again_argv = [str(exported / "studies.yaml"), "--output", str(exported), "--report-only"]
    assert main([*again_argv, "--export", str(exported)]) == 0
    capsys.readouterr()


def test_what_cannot_be_compared_is_named(
    write_studies: WriteStudies, tmp_path: Path, cfg: PretrainConfig
) -> None:
    studies = """\
  - name: balancing
    title: Balancing
    source: OLMoE, Figure 9
    runs: {base: with, no_balancing: without}
    better: base
    metric: task arc
"""
    path = str(write_studies(studies=studies))
    for run in ("base", "no_balancing"):
        directory = tmp_path / "out/runs" / run / "seed_1"
        write_run(directory, cfg, [5.0, 4.0, 3.0], valid=[3.0])

    assert main([path, "--output", str(tmp_path / "out"), "--report-only"]) == 0

    signs = (tmp_path / "out/report/signs.md").read_text()
    assert (
        "0 agrees, 0 disagrees, 0 undecided; without results of both runs: Balancing (task arc)"
        in signs
    )


def test_pairs_and_seeds_without_a_value_are_named(
    write_studies: WriteStudies, tmp_path: Path, cfg: PretrainConfig
) -> None:
    studies = """\
  - {name: s, title: S, runs: {base: with, no_balancing: without, third: other}, better: base}
"""
    path = str(write_studies("  third: {}\n" + RUNS, studies))
    output = tmp_path / "out"
    runs = output / "runs"
    for seed in (1, 2, 3):
        write_run(runs / f"base/seed_{seed}", cfg, [5.0, 4.0, 3.0], valid=[3.0 + seed])
        write_run(runs / f"no_balancing/seed_{seed}", cfg, [5.0, 4.0, 3.5], valid=[3.5 + 2 * seed])
    # Seed 2 diverges, after an evaluation that was good; seed 3 ends by an error; one has no loss.
    diverged = runs / "no_balancing/seed_2/metrics.jsonl"
    lines = diverged.read_text().splitlines()
    step, evaluation = json.loads(lines[-2]), json.loads(lines[-1])
    lost = {**evaluation, "iteration": 4, "consumed_tokens": 256, "valid_loss": {"set0": None}}
    step |= {"iteration": 4, "consumed_tokens": 256, "lm_loss": None, "skipped": 1}
    diverged.write_text("\n".join([*lines, json.dumps(step), json.dumps(lost)]) + "\n")
    (runs / "no_balancing/seed_3/ended.json").write_text(json.dumps({"reason": "error"}))

    assert main([path, "--output", str(output), "--report-only"]) == 0

    report = output / "report"
    (pair,) = [
        line
        for line in csv.DictReader(io.StringIO((report / "signs.csv").read_text()))
        if line["decides"] == "yes"
    ]
    assert (pair["seeds"], pair["ours"]) == ("1", "1.5")
    assert pair["left_out"] == "no_balancing seed 2; no_balancing seed 3"
    signs = (report / "signs.md").read_text()
    page = (report / "index.html").read_text()
    for text in (signs, page):
        assert "without results of both runs: S, other beside with (valid)" in text
        assert (
            "Not as it should be: no_balancing seed 2 (no finite train, valid, valid set0 in the"
            " end; 1 steps refused), no_balancing seed 3 (failed before its last step)."
        ) in text
    assert "1 (2 left out)" in signs
    # The tables alone say so too.
    tables = tmp_path / "tables"
    tables.mkdir()
    write_tables(tables, read_tables(report))
    assert (tables / "results.csv").read_bytes() == (report / "results.csv").read_bytes()


def test_an_export_keeps_the_reports_of_others(
    write_studies: WriteStudies,
    tmp_path: Path,
    cfg: PretrainConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "out/runs/base/seed_1", cfg, [3.0], valid=[3.0])
    other = tmp_path / "mine/report/precious.txt"
    other.parent.mkdir(parents=True)
    other.write_text("keep")

    argv = [str(write_studies()), "--output", str(tmp_path / "out"), "--report-only"]
    assert main([*argv, "--export", str(tmp_path / "mine")]) == 2

    assert "is no export" in capsys.readouterr().err
    assert other.read_text() == "keep"


@pytest.mark.parametrize("seeds", ["1,01", "1,1", "1,x", "", "1,,2"])
def test_seeds_are_different_numbers(
    seeds: str, write_studies: WriteStudies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(write_studies()), "--output", str(tmp_path / "out"), "--list", "--seeds", seeds]
    assert main(argv) == 2
    assert "must be different whole numbers" in capsys.readouterr().err


def test_without_runs_and_tables_there_is_no_report(
    write_studies: WriteStudies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_studies()), "--output", str(tmp_path / "x"), "--report-only"]) == 2
    assert "results.csv cannot be read" in capsys.readouterr().err


def test_the_commit_is_that_of_the_clone(tmp_path: Path) -> None:
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main\n")
    assert commit_of(tmp_path) == "b" * 40
    (git / "refs/heads/main").write_text("a" * 40)
    assert commit_of(tmp_path) == "a" * 40
    assert commit_of(tmp_path / "none") is None
