"""Tests the recipes of a sweep's runs, how far runs are, and what starts them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.trainer.config.recipe import flatten
from megatron.trainer.errors import ConfigError
from moe_app.ablate.ablate_command import main
from moe_app.ablate.derived_recipes import derive_recipes
from moe_app.ablate.studies_file import Sweep, read_studies
from moe_app.ablate.sweep_jobs import SweepJob, check_recipe, commands_of, list_jobs, write_recipe
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.upcycling import Upcycling
from tests.unit.app.ablate.conftest import RUNS, WriteStudies

DENSE = "  dense: {num_experts: null, ffn_hidden_size: 64}\n"
TAIL = (
    "  tail: {anneal_from: {run: base, iteration: 20}, lr_wsd_decay_style: linear,"
    " lr_wsd_decay_iters: 5, lr_warmup_fraction: null}\n"
)
UPCYCLED = (
    "  up: {upcycle: {run: dense, num_experts: 4, moe_router_topk: 2, granularity: 2, noise: 0.5,"
    " moe_layer_freq: 2, preserve_function: true, iteration: 30}, moe_z_loss_coeff: 0.5}\n"
)


def parse(*argv: str) -> PretrainConfig:
    return parse_recipe(argv, prog="test", description="")


def jobs_of(path: Path, output: Path) -> tuple[Sweep, dict[str, SweepJob]]:
    """List the jobs by name and seed."""
    sweep = read_studies(str(path))
    return sweep, {
        f"{job.run.name}/{job.seed}": job for job in list_jobs(sweep, derive_recipes(sweep), output)
    }


def finish(job: SweepJob, iteration: int = 40) -> None:
    """Write what a finished run leaves."""
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "ended.json").write_text(json.dumps({"reason": "finished"}))
    (job.directory / f"iter_{iteration:07d}").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("override", "flags"),
    [
        ("moe_aux_loss_coeff: 0.0", ["--moe-aux-loss-coeff", "0.0"]),
        # The warm-up is a tenth of the new length, as with the flag.
        ("train_iters: 20", ["--train-iters", "20"]),
        ("train_tokens: 1280", ["--train-tokens", "1280"]),
        ("global_batch_size: 8", ["--global-batch-size", "8"]),
        ("moe-z-loss-coeff: 0.0, wandb-name: null", ["--moe-z-loss-coeff", "0.0"]),
    ],
)
def test_a_derived_recipe_is_the_recipe_with_flags(
    write_studies: WriteStudies, tmp_path: Path, override: str, flags: list[str]
) -> None:
    path = write_studies(f"  base: {{}}\n  no_balancing: {{{override}}}\n")
    sweep, jobs = jobs_of(path, tmp_path / "out")
    job = jobs["no_balancing/2"]

    write_recipe(sweep, job)

    written = parse("--config", str(job.directory / "recipe.yaml"))
    plain = parse("--config", sweep.runs["base"].recipe, "--seed", "2", *flags)
    assert flatten(written) == flatten(replace(plain, checkpoint=written.checkpoint))
    assert written.checkpoint == replace(plain.checkpoint, save=None)
    assert job.cfg == written
    assert parse("--config", str(job.directory / "recipe.yaml"), "--lr", "1").optimizer.lr == 1


def test_all_seeds_of_a_run_share_the_rest(write_studies: WriteStudies, tmp_path: Path) -> None:
    _, jobs = jobs_of(write_studies(), tmp_path)

    assert list(jobs) == [f"{run}/{seed}" for seed in (1, 2, 3) for run in ("base", "no_balancing")]
    first, second = jobs["base/1"].cfg, jobs["base/2"].cfg
    assert (first.training.seed, second.training.seed) == (1, 2)
    assert replace(first, training=second.training) == second


def test_a_branch_begins_from_its_trunk_under_the_same_seed(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    sweep, jobs = jobs_of(write_studies(RUNS + TAIL), tmp_path)
    job = jobs["tail/3"]
    write_recipe(sweep, job)

    (command,) = commands_of(job)

    assert command[-4:] == [
        *("--save", str(tmp_path / "runs/tail/seed_3")),
        *("--load", str(tmp_path / "runs/base/seed_3")),
    ]
    cfg = parse(*command[command.index("--config") :])
    assert (cfg.checkpoint.anneal_from, cfg.training.train_iters) == (20, 25)
    assert cfg.optimizer.lr_wsd_decay_iters == 5


def test_an_upcycled_run_has_the_architecture_that_upcycling_makes(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    _, jobs = jobs_of(write_studies(RUNS + DENSE + UPCYCLED), tmp_path)
    job, dense = jobs["up/2"], jobs["dense/2"]

    upcycle, pretrain = commands_of(job)

    rule = Upcycling(num_experts=4, topk=2, granularity=2, preserve_function=True, layer_freq=2)
    assert job.cfg.model.architecture() == rule.model(dense.cfg.model).architecture()
    assert job.cfg.model.moe_z_loss_coeff == 0.5
    assert upcycle[upcycle.index("upcycle") + 1 :] == [
        *("--load", str(dense.directory), "--save", str(job.directory / "upcycled")),
        *("--num-experts", "4", "--moe-router-topk", "2", "--granularity", "2"),
        *("--noise", "0.5", "--drop", "0.0", "--seed", "2", "--moe-layer-freq", "2"),
        *("--ckpt-step", "30", "--preserve-function"),
    ]
    assert pretrain[-2:] == ["--load", str(job.directory / "upcycled")]

    (job.directory / "upcycled").mkdir(parents=True)
    (job.directory / "upcycled/upcycling.json").write_text("{}")
    assert commands_of(job) == [pretrain]
    (job.directory / "iter_0000010").mkdir()
    ((*_, load),) = commands_of(job)
    assert load == str(job.directory)


def test_an_upcycled_run_cannot_set_another_architecture(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    runs = RUNS + DENSE + UPCYCLED.replace("moe_z_loss_coeff: 0.5", "moe_ffn_hidden_size: 64")

    with pytest.raises(ConfigError, match=r"run 'up': .* moe_ffn_hidden_size \(64, not 32\)"):
        jobs_of(write_studies(runs), tmp_path)


def test_a_run_is_finished_or_interrupted_as_its_records_say(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    _, jobs = jobs_of(write_studies(), tmp_path)
    job = jobs["base/1"]
    assert job.state == "new"

    job.directory.mkdir(parents=True)
    (job.directory / "ended.json").write_text(json.dumps({"reason": "signal"}))
    assert job.state == "new"
    (job.directory / "iter_0000010").mkdir()
    (job.directory / "metrics.jsonl").write_text('{"iteration": 12, "lm_loss": 3.0}\n')
    assert (job.state, job.iteration) == ("interrupted", 12)
    finish(job)
    assert job.state == "finished"


def test_a_run_that_saved_nothing_begins_again_without_records(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    _, jobs = jobs_of(write_studies(RUNS + TAIL), tmp_path)
    job = jobs["tail/1"]
    job.directory.mkdir(parents=True)
    (job.directory / "metrics.jsonl").write_text('{"iteration": 21, "lm_loss": 3.0}\n')

    commands_of(job)

    assert not (job.directory / "metrics.jsonl").exists()


def test_a_changed_recipe_is_refused(write_studies: WriteStudies, tmp_path: Path) -> None:
    sweep, jobs = jobs_of(write_studies(), tmp_path)
    job = jobs["no_balancing/1"]
    write_recipe(sweep, job)
    check_recipe(job)

    _, jobs = jobs_of(write_studies(RUNS.replace("0.0", "0.5")), tmp_path)

    check_recipe(jobs["base/1"])
    with pytest.raises(
        ConfigError,
        match=r"no_balancing seed 1: .* moe_aux_loss_coeff was 0.0 and is 0.5; .* remove the dir",
    ):
        check_recipe(jobs["no_balancing/1"])


def test_a_setting_that_came_later_is_no_change(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    sweep, jobs = jobs_of(write_studies(), tmp_path)
    job = jobs["base/1"]
    write_recipe(sweep, job)
    path = job.directory / "recipe.yaml"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("wandb_name:")))

    check_recipe(job)


def test_checkpoints_of_something_else_are_refused(
    write_studies: WriteStudies, tmp_path: Path
) -> None:
    _, jobs = jobs_of(write_studies(), tmp_path)
    finish(jobs["base/1"])

    with pytest.raises(ConfigError, match=r"holds checkpoints and no recipe.yaml"):
        check_recipe(jobs["base/1"])


def test_the_list_numbers_the_runs(
    write_studies: WriteStudies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_studies(RUNS + TAIL)
    _, jobs = jobs_of(path, tmp_path / "out")
    finish(jobs["base/2"])

    assert main([str(path), "--output", str(tmp_path / "out"), "--list", "--seeds", "7,2"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "0 base seed 7 new",
        "1 no_balancing seed 7 new",
        "2 tail seed 7 new after 0",
        "3 base seed 2 finished",
        "4 no_balancing seed 2 new",
        "5 tail seed 2 new after 3",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--index", "9"], "--index 9 must be from 0 to 8"),
        (["--index", "2"], "tail seed 1, which begins from base seed 1 (--index 0), and that is"),
        (["--seeds", "1,1"], "--seeds 1,1 must be different whole numbers"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    write_studies: WriteStudies,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    path = write_studies(RUNS + TAIL)

    assert main([str(path), "--output", str(tmp_path / "out"), *flags]) == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
