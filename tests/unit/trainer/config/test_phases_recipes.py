"""Compares the recipes in examples/ with the published schedules and mixtures."""

from pathlib import Path

import pytest

from megatron.trainer.config.durations import (
    phase_samples,
    phase_steps,
    tokens_per_step,
)
from megatron.trainer.config.validate import validate
from megatron.trainer.optim.schedules import build_schedule
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from tests.paths import REPO

EXAMPLES = REPO / "examples"
JETMOE = EXAMPLES / "jetmoe_8b" / "jetmoe_8b.yaml"
OLMOE = EXAMPLES / "olmoe_1b_7b" / "olmoe_1b_7b.yaml"
ANNEAL = EXAMPLES / "olmoe_1b_7b" / "anneal.yaml"


def parse(path: Path, *flags: str) -> PretrainConfig:
    return parse_recipe(["--config", str(path), *flags], prog="test", description="")


def mixture(data_path: tuple[str, ...]) -> dict[str, float]:
    return {
        Path(prefix).name.removesuffix("_text_document"): float(weight)
        for weight, prefix in zip(data_path[::2], data_path[1::2], strict=True)
    }


def test_jetmoe_recipe_has_the_papers_numbers() -> None:
    """Compares with arXiv 2404.07413, table 1 and section 4.2."""
    cfg = parse(JETMOE)
    assert tokens_per_step(cfg.training) == 4_194_304
    assert phase_steps(cfg) == [238_419, 59_605]
    assert cfg.training.train_iters == 298_024
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.clip_grad) == (
        5e-4,
        0.1,
        1.0,
    )
    assert (cfg.model.moe_aux_loss_coeff, cfg.model.moe_z_loss_coeff) == (0.01, 0.001)
    schedule = build_schedule(cfg)
    assert schedule(0) == schedule(298_024 * 4_194_304) == 5e-5
    assert schedule(2_384 * 4_194_304) < schedule(2_385 * 4_194_304) == 5e-4
    # The decay starts with the second phase, after a thousand billion tokens.
    first, _ = phase_samples(cfg)
    assert first * 4_096 == 1e12
    assert schedule(first * 4_096) == 5e-4 > schedule((first + 1) * 4_096)


def test_jetmoe_mixtures_match_the_paper() -> None:
    """Compares with figure 2 and table 2, whose groups are summed here."""
    stable, decay = (mixture(phase.data_path) for phase in parse(JETMOE).data.phases)
    pile = ("pile-wikipedia", "pile-stackexchange", "pile-remaining")
    assert sum(stable.values()) == pytest.approx(100)
    assert sum(stable[name] for name in pile) == pytest.approx(8)
    assert (stable["refinedweb"], stable["starcoder"]) == (64, 25)
    assert (stable["pes2o"], stable["open-web-math"], stable["pile-arxiv"]) == (1, 1, 1)
    assert sum(decay.values()) == pytest.approx(99.7)
    mathematics = ("open-web-math", "algebraic-stack", "template-gsm", "stack-math-qa")
    assert sum(decay.pop(name) for name in mathematics) == pytest.approx(5.8)
    assert decay == {
        "refinedweb": 39.8,
        "pile-wikipedia": 6.7,
        "pile-stackexchange": 4.8,
        "pile-arxiv": 1.0,
        "pile-remaining": 5.1,
        "pes2o": 1.0,
        "language-sft": 7.3,
        "ultratextbooks": 4.8,
        "starcoder": 19.6,
        "code-sft": 3.8,
    }


def test_olmoe_anneal_has_the_papers_numbers() -> None:
    """Compares model, batch and mixture with the main stage from step 1,200,000 on."""
    main, anneal = parse(OLMOE), parse(ANNEAL)
    assert anneal.checkpoint.anneal_from == main.training.train_iters == 1_200_000
    assert anneal.checkpoint.load == main.checkpoint.save != anneal.checkpoint.save
    assert anneal.training.train_iters == 1_223_842
    assert (anneal.model, anneal.parallel) == (main.model, main.parallel)
    assert anneal.data == main.data
    assert tokens_per_step(anneal.training) == tokens_per_step(main.training)
    assert (anneal.training.seed, main.training.seed) == (42, 6198)
    assert build_schedule(main)(1_200_000) == pytest.approx(4e-5, rel=1e-12)
    assert (anneal.optimizer.lr_wsd_decay_style, anneal.optimizer.min_lr) == ("linear", 0.0)


def test_commands_that_try_the_layout_are_valid() -> None:
    common = ("--mock-data", "--train-iters", "20", "--lr-warmup-iters", "0")
    free = ("--save", "check", "--load", "None", "--tokenizer-model", "None")
    cfg = parse(JETMOE, *common, *free, "--lr-wsd-decay-iters", "10")
    validate(cfg, 96)
    assert [build_schedule(cfg)(step) for step in (0, 10, 20)] == pytest.approx([5e-4, 5e-4, 5e-5])
    validate(parse(OLMOE, *common, *free, "--lr-decay-iters", "20"), 256)
