"""Tests submit with recipes of fine-tuning and alignment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.checkpoint import layout
from megatron.trainer.config.recipe import dump_config
from megatron.trainer.records.history import PlannedEnd
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.align.align_config import AlignConfig
from moe_app.finetune.tuning_config import FinetuneConfig, parse_tuning
from moe_app.pretrain.config import parse_recipe
from moe_app.submission import submit

TUNING = """\
load: base
train_data: [chats.jsonl]
template: olmoe
packing: true
global_batch_size: 4
micro_batch_size: 2
seq_length: 64
train_epochs: 2
"""
SUBMITTED = {
    "finetune": TUNING,
    "align": f"{TUNING.replace('packing: true', '')}method: kto\n",
}


@pytest.fixture
def base(here: Path) -> Path:
    """Make a checkpoint's config, and a file of texts."""
    path = layout.final_path(here / "base", 3)
    path.mkdir(parents=True)
    flags = ["--preset", "olmoe_tiny", "--tokenizer-model", "tok.json", "--mock-data"]
    (path / CONFIG_NAME).write_text(dump_config(parse_recipe(flags, prog="test", description="")))
    (here / "chats.jsonl").write_text("{}\n")
    return path


@pytest.mark.parametrize("stage", SUBMITTED)
def test_a_recipe_of_another_stage_runs_its_tool(
    stage: str, base: Path, here: Path, fake: Callable[[str, str], None], capsys: Any
) -> None:
    fake("sbatch", 'echo 77; cat "$2" > sent')
    (here / "b.yaml").write_text(SUBMITTED[stage])
    assert submit.main(["b.yaml", "--nodes", "2", "--save", "runs/x", "--lr", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert f"tool: tools/{stage}.py\n" in shown
    assert "length: 2 epochs of the training texts; how many steps" in shown
    assert f"export STAGE={stage}\n" in (here / "sent").read_text()
    # The job reads what was checked, and goes on from its own checkpoints when it is requeued.
    kind: Any = AlignConfig if stage == "align" else FinetuneConfig
    recipe = ["--config", "runs/x/slurm/recipe.yaml"]
    cfg = parse_tuning(kind, recipe, prog="test", description="")
    assert cfg.optimizer.lr == 0.01 and cfg.tuning.train_epochs == 2
    assert (cfg.checkpoint.load, cfg.checkpoint.finetune) == ("base", True)
    (here / "runs/x").joinpath(base.name).symlink_to(base)
    again = ["--save", "runs/x", "--load", "runs/x", "--no-finetune"]
    resumed = parse_tuning(kind, [*recipe, *again], prog="test", description="")
    assert not resumed.checkpoint.finetune and resumed.model == cfg.model
    if stage == "align":
        assert resumed.align.reference_load == "base"
    # Its length is the job's to say.
    record = {"iteration": 20, "lm_loss": 2.5, "tokens_per_second": 512.0}
    assert submit.progress(record, cfg) == "step 20, lm_loss 2.5000, 512 tokens/s"
    end = PlannedEnd(train_iters=40, train_tokens=10_240)
    assert submit.progress({**record, "consumed_tokens": 5_120}, cfg, end) == (
        "step 20 of 40 (50%), lm_loss 2.5000, 512 tokens/s, 0:00:10 left"
    )


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (TUNING.replace("chats", "none"), [], "--train-data none.jsonl does not exist"),
        (TUNING.replace("base", "none"), [], "--load none holds no checkpoint"),
        (TUNING, ["--nodes", "3"], "global_batch_size (4) must be a multiple of"),
        (TUNING, ["--method", "dpo", "--train-on", "all"], "--train-on is all, but alignment"),
        (SUBMITTED["align"], ["--save", "base"], "--load base is the run itself, which is no"),
        ("preset: olmoe_tiny\n", ["--stage", "finetune"], "load (None) must name a checkpoint"),
        (TUNING, ["--stage", "pretrain"], "train_data"),
    ],
)
def test_what_a_tuning_job_would_fail_with_is_said_before(
    recipe: str, flags: list[str], message: str, base: Path, here: Path, capsys: Any
) -> None:
    (here / "b.yaml").write_text(recipe)
    assert submit.main(["b.yaml", "--save", "runs/x", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()
