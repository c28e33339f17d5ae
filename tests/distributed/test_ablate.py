"""Tests that runs of a sweep train as the trainer does by itself, also when they are stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.records.record_file import read_records
from moe_app.ablate.derived_recipes import derive_recipes
from moe_app.ablate.studies_file import read_studies
from moe_app.ablate.sweep_jobs import SweepJob, commands_of, list_jobs, write_recipe
from moe_app.ablate.sweep_report import write_report
from tests.distributed.launcher import alone, ranks

RECIPE = """\
num_layers: 1
hidden_size: 16
num_attention_heads: 2
num_query_groups: 2
num_experts: 4
moe_router_topk: 2
moe_ffn_hidden_size: 8
vocab_size: 64
seq_length: 8
micro_batch_size: 2
global_batch_size: 2
train_iters: 4
lr: 0.01
mock_data: true
save_interval: 2
log_interval: 1
"""
STUDIES = """\
seeds: [7]
runs:
  base: {{}}
  dense: {{num_experts: null, ffn_hidden_size: 16}}
  upcycled: {{upcycle: {{run: dense, num_experts: 4, moe_router_topk: 2}}, train_iters: 3}}
  tail:
    anneal_from: {{run: base, iteration: 2}}
    lr_wsd_decay_style: linear
    lr_wsd_decay_iters: 3
studies:
- {{name: s, runs: {{base: a, dense: b, upcycled: c, tail: d}}, better: none, metric: train}}
recipe: {recipe}
"""
SPEEDS = ("tokens_per_second", "model_tflops")


def train(command: Sequence[str], *more: str) -> None:
    """Do what a command line of a sweep does, without torchrun."""
    module = command.index("moe_app.pretrain") if "moe_app.pretrain" in command else None
    if module is None:
        done = alone("tools/upcycle.py", *command[command.index("upcycle") + 1 :])
    else:
        done = ranks(1, "tools/pretrain.py", *command[module + 1 :], *more)
    assert done.returncode == 0, done.stderr[-3000:]


def records_of(directory: Path) -> list[dict[str, Any]]:
    """Return what a run recorded, without what depends on the machine."""
    return [
        {key: value for key, value in record.items() if key not in SPEEDS}
        for record in read_records(directory / "metrics.jsonl")
    ]


def test_stopped_runs_of_a_sweep_train_as_if_they_were_not(tmp_path: Path) -> None:
    recipe, studies = tmp_path / "recipe.yaml", tmp_path / "studies.yaml"
    recipe.write_text(RECIPE)
    studies.write_text(STUDIES.format(recipe=recipe))
    sweep = read_studies(str(studies))
    jobs = list_jobs(sweep, derive_recipes(sweep), tmp_path / "out")

    for job in jobs:
        write_recipe(sweep, job)
        *before, pretrain = commands_of(job)
        for command in before:
            train(command)
        if job.run.name in ("base", "tail", "upcycled"):
            # Stopped after three steps in the branch, which begins behind two, else after two.
            train(pretrain, "--exit-interval", "3" if job.run.name == "tail" else "2")
            assert job.state == "interrupted"
            (pretrain,) = commands_of(job)
        train(pretrain)
        assert job.state == "finished"

    by_name = {job.run.name: job for job in jobs}
    check_against_the_trainer(by_name, recipe, tmp_path)
    report = write_report(sweep, jobs, tmp_path / "out")
    assert "4 runs, seeds [7]" in report.read_text()


def check_against_the_trainer(jobs: dict[str, SweepJob], recipe: Path, root: Path) -> None:
    """Compare with runs that nothing stopped, started from flags."""
    flags = ["--config", str(recipe), "--seed", "7", "--save"]
    tail = ["--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", "3", "--anneal-from", "2"]
    for name, more in {"base": [], "tail": [*tail, "--load", str(root / "base")]}.items():
        train(["moe_app.pretrain", *flags, str(root / name), *more])
        assert records_of(root / name) == records_of(jobs[name].directory), name
    steps = {
        name: sorted({each["iteration"] for each in records_of(job.directory)})
        for name, job in jobs.items()
    }
    assert steps == {
        "base": [1, 2, 3, 4],
        "dense": [1, 2, 3, 4],
        "upcycled": [1, 2, 3],
        "tail": [3, 4, 5],
    }
