"""Compares the recipes of fine-tuning and alignment in examples/ with what was published."""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.checkpoint import layout
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.schema import TrainingConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.optim.schedules import build_schedule
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.align.align_config import AlignConfig
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_files import BadRows, find_chat_files, read_units
from moe_app.finetune.tuning_config import FinetuneConfig, TuningConfig, parse_tuning, with_epochs
from moe_app.planner.search import PlanConfig, PlanningConfig, memory_limit, search
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.presets import PRESETS
from tests.paths import REPO

EXAMPLES = REPO / "examples"
AT_FIRST = {
    "olmoe_1b_7b_sft": "olmoe_1b_7b",
    "olmoe_1b_7b_dpo": "olmoe_1b_7b",
    "olmoe_1b_7b_kto": "olmoe_1b_7b",
    "jetmoe_8b_dsft": "jetmoe_8b",
    "jetmoe_8b_ddpo": "jetmoe_8b",
}
"""Recipes, with the preset of the model that they begin from."""
SAMPLES_OF_LOGS = {"olmoe_1b_7b_sft": 607_950, "olmoe_1b_7b_dpo": 60_917}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a recipe reads of a checkpoint: its config, with the tokenizer beside it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for preset in set(AT_FIRST.values()):
        path = layout.final_path(root / preset, 0)
        path.mkdir(parents=True)
        cfg = PretrainConfig(
            model=MoEModelConfig(**PRESETS[preset]), training=TrainingConfig(bf16=True)
        )
        (path / CONFIG_NAME).write_text(dump_config(cfg))
        (path / "tokenizer.json").write_text("{}")
    return root


def path_of(name: str) -> Path:
    return EXAMPLES / name / f"{name}.yaml"


@functools.cache
def parse(name: str, checkpoints: Path, *flags: str) -> Any:
    kind: type[TuningConfig] = FinetuneConfig if "sft" in name else AlignConfig
    load = ("--load", str(checkpoints / AT_FIRST[name]))
    argv = ["--config", str(path_of(name)), *load, *flags]
    return parse_tuning(kind, argv, prog="test", description="")


def ranks_of(name: str) -> int:
    found = re.match(r"# ranks: (\d+)\n", path_of(name).read_text("utf-8"))
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", AT_FIRST)
def test_recipe_fits_the_gpus_it_names(name: str, checkpoints: Path) -> None:
    cfg, ranks = parse(name, checkpoints), ranks_of(name)
    validate(cfg, ranks)
    assert ranks == (32 if name in SAMPLES_OF_LOGS else 8)
    assert (cfg.training.bf16, cfg.model.moe_aux_loss_coeff, cfg.model.moe_z_loss_coeff) == (
        *(True, 0, 0),
    )
    sizes = MoEModelConfig(**PRESETS[AT_FIRST[name]])
    off: dict[str, Any] = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    assert cfg.model == dataclasses.replace(sizes, **off)
    # Both texts of a pair, or an answer and a mismatched one, are in memory at once.
    texts = 1 if isinstance(cfg, FinetuneConfig) else 2
    training = dataclasses.replace(
        cfg.training,
        micro_batch_size=texts * cfg.training.micro_batch_size,
        global_batch_size=texts * cfg.training.global_batch_size,
    )
    expert = (cfg.parallel.expert_model_parallel_size,)
    planned = PlanConfig(
        model=cfg.model,
        training=training,
        parallel=cfg.parallel,
        planning=PlanningConfig(
            tp=(1,), pp=(1,), cp=(1,), vp=(1,), ep=expert, etp=(1,), distributed_optimizer="on"
        ),
    )
    (plan,) = search(planned, ranks).plans
    needed = plan.footprint.peak + (texts > 1) * plan.footprint.state.weights
    assert needed < memory_limit(planned.planning)
    estimate = re.search(r"(\d+) GB a GPU", (EXAMPLES / name / "README.md").read_text("utf-8"))
    assert estimate and int(estimate[1]) == round(plan.footprint.peak / 1e9)


@pytest.mark.parametrize("name", ["olmoe_1b_7b_sft", "olmoe_1b_7b_kto"])
def test_printed_config_is_read_back(
    name: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        parse(name, checkpoints, "--print-config")
    assert end.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse_tuning(
        type(parse(name, checkpoints)), ["--config", str(printed)], prog="test", description=""
    )
    assert again == parse(name, checkpoints)


def test_of_epochs_and_steps_the_later_layer_wins(checkpoints: Path) -> None:
    """Otherwise a few steps of a recipe are all of its epochs."""
    steps = parse("olmoe_1b_7b_sft", checkpoints, "--train-iters", "3")
    assert (steps.tuning.train_epochs, steps.training.train_iters) == (None, 3)
    assert with_epochs(steps, 1000) == steps
    epochs = parse("olmoe_1b_7b_kto", checkpoints, "--train-epochs", "2")
    assert with_epochs(epochs, 320).training.train_iters == 20
    with pytest.raises(ConfigError, match=r"--train-epochs 2 and --train-iters are two lengths"):
        parse("olmoe_1b_7b_sft", checkpoints, "--train-epochs", "2", "--train-iters", "3")


def adam(cfg: TuningConfig) -> tuple[float, ...]:
    each = cfg.optimizer
    assert each.optimizer == "adam"
    return (each.adam_beta1, each.adam_beta2, each.adam_eps, each.weight_decay, each.clip_grad)


def test_olmoe_sft_has_the_numbers_of_paper_and_log(checkpoints: Path) -> None:
    cfg = parse("olmoe_1b_7b_sft", checkpoints)
    chat, training = cfg.chat, cfg.training
    assert (training.global_batch_size, training.micro_batch_size) == (128, 2)
    assert (training.seq_length, cfg.tuning.train_epochs, chat.overlong) == (4096, 2, "drop")
    assert (chat.template, chat.train_on, chat.has_packing("sft")) == ("olmoe", "assistant", False)
    assert cfg.sft.loss_reduction == "sum"
    assert adam(cfg) == (0.9, 0.999, 1e-8, 0.0, 1.0)
    run = with_epochs(cfg, SAMPLES_OF_LOGS["olmoe_1b_7b_sft"])
    assert (run.training.train_iters, run.optimizer.lr_warmup_iters) == (9_500, 285)
    rate = build_schedule(run)
    tokens = 128 * 4096  # a step's; the length is in tokens
    assert rate(1 * tokens) == pytest.approx(7.0e-8, rel=0.01)
    assert rate(285 * tokens) == pytest.approx(2e-5, rel=1e-4)
    assert rate(4893 * tokens) == pytest.approx(1e-5, rel=1e-3)  # linear: half way
    assert rate(9_500 * tokens) == pytest.approx(0, abs=1e-12)


def test_olmoe_dpo_has_the_numbers_of_paper_and_log(checkpoints: Path) -> None:
    cfg = parse("olmoe_1b_7b_dpo", checkpoints)
    align, training = cfg.align, cfg.training
    assert (align.method, align.beta, align.label_smoothing) == ("dpo", 0.1, 0.0)
    assert not align.average_log_prob
    assert (training.global_batch_size, training.micro_batch_size) == (32, 1)
    assert (training.seq_length, cfg.tuning.train_epochs) == (4096, 3)
    assert (cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.chat.template) == (5e-7, 0.0, "olmoe")
    assert adam(cfg) == (0.9, 0.999, 1e-8, 0.0, 1.0)
    run = with_epochs(cfg, SAMPLES_OF_LOGS["olmoe_1b_7b_dpo"])
    # The log has 5,712: its epochs end with a smaller batch each.
    assert (run.training.train_iters, run.optimizer.lr_warmup_iters) == (5_711, 571)
    assert cfg.optimizer.lr_decay_style == "linear"
    assert align.reference_load == parse_load("olmoe_1b_7b_dpo") == "runs/olmoe_1b_7b_sft"


def test_olmoe_kto_has_the_numbers_of_paper_and_script(checkpoints: Path) -> None:
    cfg = parse("olmoe_1b_7b_kto", checkpoints)
    align, training, optimizer = cfg.align, cfg.training, cfg.optimizer
    assert (align.method, align.beta) == ("kto", 0.1)
    assert (align.desirable_weight, align.undesirable_weight) == (1, 1)
    assert (training.global_batch_size, training.train_iters) == (32, 5_000)
    assert (optimizer.optimizer, optimizer.lr, optimizer.rmsprop_alpha) == ("rmsprop", 5e-7, 0.99)
    assert align.reference_load == parse_load("olmoe_1b_7b_kto") == "runs/olmoe_1b_7b_sft"


def test_jetmoe_dsft_has_the_numbers_of_paper_and_card(checkpoints: Path) -> None:
    cfg = parse("jetmoe_8b_dsft", checkpoints)
    chat, training, optimizer = cfg.chat, cfg.training, cfg.optimizer
    assert (training.global_batch_size, training.micro_batch_size) == (128, 4)
    assert (training.seq_length, training.seed, cfg.tuning.train_epochs) == (2048, 42, 3)
    assert (chat.template, chat.train_on, chat.has_packing("sft")) == ("zephyr", "assistant", True)
    assert (cfg.sft.loss_reduction, len(chat.train_data)) == ("token-mean", 6)
    assert (optimizer.lr, optimizer.lr_decay_style) == (2e-5, "cosine")
    assert adam(cfg) == (0.9, 0.999, 1e-8, 0.0, 1.0)
    run = with_epochs(cfg, 2_049 * 128)
    # The card's last evaluation is at 6,147.
    assert (run.training.train_iters, run.optimizer.lr_warmup_iters) == (6_147, 615)


def test_jetmoe_ddpo_has_the_numbers_of_paper_and_card(checkpoints: Path) -> None:
    cfg = parse("jetmoe_8b_ddpo", checkpoints)
    align, training, optimizer = cfg.align, cfg.training, cfg.optimizer
    assert (align.method, align.beta) == ("dpo", 0.01)
    assert (training.global_batch_size, training.micro_batch_size) == (128, 4)
    assert (training.seq_length, cfg.tuning.train_epochs) == (1024, 1)
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.lr_warmup_fraction) == (
        *(5e-7, "cosine", 0.1),
    )
    assert cfg.chat.template == "zephyr"
    assert align.reference_load == parse_load("jetmoe_8b_ddpo") == "runs/jetmoe_8b_dsft"


def parse_load(name: str) -> str:
    """Return what a recipe begins from, and check that it is what another one of them saves."""
    found = dict(re.findall(r"(?m)^(load|save): (\S+)$", path_of(name).read_text("utf-8")))
    assert found["save"] == f"runs/{name}"
    assert Path(found["load"]).name in AT_FIRST
    return found["load"]


@pytest.mark.parametrize("name", AT_FIRST)
def test_recipe_reads_what_its_sources_fetch(name: str, checkpoints: Path) -> None:
    head, *rows = (EXAMPLES / name / "sources.tsv").read_text("utf-8").splitlines()
    assert head == "# name\thub_id\tfiles\ttext_key\tfilters\tlayout"
    read = [Path(each) for each in parse(name, checkpoints).chat.train_data]
    if name == "olmoe_1b_7b_kto":  # made of them
        assert read == [Path("data/olmoe-kto/judged.jsonl")]
    else:
        assert [each.name for each in read] == [row.split("\t")[0] for row in rows]
        assert {each.parent.name for each in read} == {"raw"}
    assert {row.split("\t")[5] for row in rows} == {"as-is"}
    readme = (EXAMPLES / name / "README.md").read_text("utf-8")
    assert all(row.split("\t")[1] in readme for row in rows)


def test_pairs_are_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = {"role": "user", "content": "q é"}
    good, bad = ({"role": "assistant", "content": each} for each in ("yes", "no"))
    rows = [{"prompt": "q é", "chosen": [turn, good], "rejected": [turn, bad]}]
    rows.append({"prompt": "q", "chosen": [turn, good], "rejected": [turn, good]})
    source, output = tmp_path / "pairs.jsonl", tmp_path / "made" / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = importlib.util.spec_from_file_location(
        "to_judged", EXAMPLES / "olmoe_1b_7b_kto" / "to_judged.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["to_judged.py", str(output), str(source)])
    assert module.main() == 0
    assert "2 judged answers; 1 pairs left out" in capsys.readouterr().out
    files = find_chat_files([str(output)], flag="")
    units = [unit for _, unit in read_units(files, "kto", ChatDataConfig(), BadRows(0))]
    assert [unit.label for unit in units] == [True, False]
    texts = [[turn.content for turn in unit.dialogues[0].turns] for unit in units]
    assert texts == [["q é", "yes"], ["q é", "no"]]
