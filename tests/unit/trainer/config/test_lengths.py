"""Lengths in steps, in tokens and as a fraction, through recipes, flags and other batches."""

from pathlib import Path

import pytest

from megatron.trainer.config.batch_plan import Progress
from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.durations import run_plan
from megatron.trainer.config.schedule_lengths import describe_lengths, schedule_lengths
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.optim.schedules import build_schedule
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from tests.paths import REPO

# 128 tokens a step.
BASE = "global_batch_size: 8\nseq_length: 16\nvocab_size: 120\n"
PHASES = "phases: [{name: a, train_tokens: 640, data_path: [x]}]\n"
WSD = "lr_decay_style: WSD\nlr_wsd_decay_style: linear\n"


def parse(tmp_path: Path, text: str, *flags: str) -> PretrainConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + text)
    return parse_recipe(["--config", str(path), *flags], prog="test", description="")


def printed(tmp_path: Path, cfg: PretrainConfig, *flags: str) -> PretrainConfig:
    path = tmp_path / "printed.yaml"
    path.write_text(dump_config(cfg))
    return parse_recipe(["--config", str(path), *flags], prog="test", description="")


@pytest.mark.parametrize(
    ("text", "flags", "steps"),
    [
        ("train_iters: 40\n", (), 4),
        ("train_iters: 200\n", (), 20),
        ("train_iters: 4\n", (), 0),
        ("train_iters: 40\nlr_decay_iters: 60\n", (), 6),
        ("train_tokens: 5_120\n", (), 4),
        ("train_iters: 40\n", ("--lr-warmup-iters", "7"), 7),
        ("train_iters: 40\n", ("--lr-warmup-tokens", "384"), 3),
        ("train_iters: 40\nlr_warmup_fraction: 0.5\n", (), 20),
    ],
)
def test_warm_up_is_a_fraction_until_a_later_layer_says_otherwise(
    tmp_path: Path, text: str, flags: tuple[str, ...], steps: int
) -> None:
    given = "" if "fraction" in text else "lr_warmup_fraction: 0.1\n"
    cfg = parse(tmp_path, text + given, *flags)
    validate(cfg, 1)
    assert cfg.optimizer.lr_warmup_iters == steps
    assert (cfg.optimizer.lr_warmup_fraction is None) == bool(flags)
    assert printed(tmp_path, cfg) == cfg


def test_printed_fraction_follows_a_flag_that_changes_the_length(tmp_path: Path) -> None:
    cfg = parse(tmp_path, "train_iters: 40\nlr_warmup_iters: 9\n", "--lr-warmup-fraction", "0.25")
    assert cfg.optimizer.lr_warmup_iters == 10
    assert printed(tmp_path, cfg, "--train-iters", "4").optimizer.lr_warmup_iters == 1


def test_fraction_of_tokens_is_in_tokens(tmp_path: Path) -> None:
    cfg = parse(tmp_path, "train_tokens: 1_300\nlr_warmup_fraction: 0.1\n")
    lengths = schedule_lengths(cfg)
    assert (lengths.unit, lengths.warmup, lengths.decay_end) == ("tokens", 130, 1_300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr_warmup_fraction: 1.0\n",
            "lr_warmup_fraction (1.0) must be at least 0 and below 1, a fraction of the steps until"
            " the decay ends; use 0.01, for example",
        ),
        (
            "lr_warmup_fraction: 0.1\nlr_warmup_iters: 5\n",
            "lr_warmup_fraction (0.1) is 10 steps of train_iters (100), but lr_warmup_iters is 5;"
            " they are two spellings of one length; set one of them",
        ),
        (
            "lr_warmup_fraction: 0.1\nlr_decay_iters: 50\nlr_warmup_tokens: 640\n",
            "lr_warmup_fraction (0.1) is 5 steps of lr_decay_iters (50), but lr_warmup_tokens is"
            " 640; they are two spellings of one length; set one of them",
        ),
    ],
)
def test_fraction_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    cfg = parse(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        validate(cfg, 1)
    assert message in str(caught.value)


def test_quickstart_warms_up_for_20_of_200_steps_and_any_other_length() -> None:
    recipe = str(REPO / "examples/quickstart/olmoe_tiny.yaml")
    for flags, steps in (((), 20), (("--train-iters", "4"), 0), (("--train-iters", "20"), 2)):
        cfg = parse_recipe(["--config", recipe, *flags], prog="test", description="")
        validate(cfg, 2)
        assert cfg.optimizer.lr_warmup_iters == steps


@pytest.mark.parametrize(
    "text",
    [
        "train_tokens: 640\nlr_warmup_tokens: 256\n",
        PHASES + "lr_warmup_tokens: 256\n",
        "load: trunk\nsave: b\nanneal_from: 3\nlr_wsd_decay_style: linear\n"
        "lr_wsd_decay_tokens: 640\n",
    ],
)
@pytest.mark.parametrize(("batch", "steps"), [(16, 3), (8, 5), (4, 10), (1, 40)])
def test_printed_lengths_in_tokens_follow_a_flag_that_changes_the_batch(
    tmp_path: Path, text: str, batch: int, steps: int
) -> None:
    """As a run does that is resumed with its own config.yaml and another batch."""
    cfg = printed(tmp_path, parse(tmp_path, text), "--global-batch-size", str(batch))
    validate(cfg, 1)
    start = cfg.checkpoint.anneal_from or 0
    assert cfg.training.train_iters == start + steps
    at = Progress(iteration=start, samples=start * 8, own_samples=0, seq_length=16)
    assert run_plan(cfg).last_iteration(at) == start + steps


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_curve_in_tokens_is_to_the_bit_the_curve_in_steps(tmp_path: Path, style: str) -> None:
    text = WSD if style == "WSD" else f"lr_decay_style: {style}\n"
    steps = parse(
        tmp_path,
        text + "train_iters: 37\nlr_warmup_iters: 7\nlr_wsd_decay_iters: 11\nlr_decay_iters: 31\n",
    )
    tokens = parse(
        tmp_path,
        text + f"train_tokens: {37 * 128}\nlr_warmup_tokens: {7 * 128}\nlr_decay_tokens: {31 * 128}"
        f"\nlr_wsd_decay_tokens: {11 * 128}\n",
    )
    mixed = parse(
        tmp_path, text + f"lr_warmup_iters: 7\nlr_wsd_decay_iters: 11\nlr_decay_tokens: {31 * 128}"
    )
    by_step, by_token, by_both = (build_schedule(cfg) for cfg in (steps, tokens, mixed))
    assert by_both == by_token
    for step in range(40):
        assert by_step(step) == by_token(step * 128), step
    at = Progress(iteration=9, samples=1_000, own_samples=1_000, seq_length=16)
    assert (by_step.position(at), by_token.position(at)) == (9, 16_000)


def test_curve_in_tokens_does_not_notice_another_batch(tmp_path: Path) -> None:
    text = WSD + "train_tokens: 5_000\nlr_warmup_tokens: 700\nlr_wsd_decay_tokens: 900\n"
    curves = [
        build_schedule(parse(tmp_path, text, "--global-batch-size", str(batch)))
        for batch in (1, 8, 64)
    ]
    assert curves[0] == curves[1] == curves[2]


def test_head_of_the_log_says_what_was_converted(tmp_path: Path) -> None:
    text = "train_tokens: 6_400\nlr_warmup_iters: 10\nrampup_batch_size: [2, 2, 24]\n"
    cfg = parse(tmp_path, text)
    validate(cfg, 1)
    # Batches of 2, 2, 2, 2, 4, 4, 6, 6, then 8: 28 samples in 8 steps, 44 in 10.
    assert cfg.training.train_iters == 8 + -(-(400 - 28) // 8)
    assert describe_lengths(cfg) == [
        "length: 55 steps of 32 to 128 tokens = 6,464 tokens",
        "batch: 2 sequences, 2 more each time, 8 after 24 sequences = 8 steps",
        "end: with the first step at or past 6,400 tokens, whatever the batch until then",
        "learning rate: a function of the tokens consumed: lr_warmup_tokens 704, lr_decay_tokens"
        " 6,400",
        "learning rate: lr_warmup_iters 10 counts as 704 tokens, the batch being 32 to 128 tokens,"
        " because another length is in tokens",
    ]


def test_ramp_up_in_steps_counts_every_step_as_one(tmp_path: Path) -> None:
    cfg = parse(tmp_path, "train_iters: 50\nrampup_batch_size: [2, 2, 24]\nlr_warmup_iters: 5\n")
    validate(cfg, 1)
    assert describe_lengths(cfg) == [
        f"length: 50 steps of 32 to 128 tokens = {(28 + 42 * 8) * 16:,} tokens",
        "batch: 2 sequences, 2 more each time, 8 after 24 sequences = 8 steps",
    ]
    assert schedule_lengths(cfg).unit == "iters"
