"""Lengths in tokens while the batch changes: on resume, and under a ramp-up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.trainer.config.batch_plan import BatchPlan
from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import Outcome, flags, run_cases

# Forty sequences of 16 tokens; the first job takes 16 of them, in batches of four.
TOKENS, FIRST = 640, 256
IN_TOKENS: dict[str, Any] = {
    "train-tokens": TOKENS,
    "lr-warmup-tokens": 192,
    "lr-decay-style": "cosine",
    "micro-batch-size": 1,
}
RAMP: dict[str, Any] = {
    "rampup-batch-size": "2 2 12",
    "train-tokens": TOKENS,
    "lr-warmup-fraction": 0.2,
    "micro-batch-size": 1,
    "eval-iters": 1,
}
SIZES = [2, 2, 4, 6, 8, 8, 8, 8]
"""Batches of that ramp-up: two more after 4, 8 and 12 sequences."""


def case(*, recipe: Path | None = None, **settings: Any) -> list[str]:
    """Flags of a run in tokens, on random ones or on a recipe's phases."""
    given = flags(**{"train_iters": False, "num_layers": 1, **settings})
    if recipe is not None:
        given.remove("--mock-data")
        given = ["--config", str(recipe), *given]
    return given


def write_phases(root: Path) -> Path:
    """18 sequences of `one`, so that a border lies within batches of four, then 22 of `two`."""
    generator = np.random.default_rng(5)
    for name in ("one", "two"):
        with TokenFileWriter(str(root / name), vocab_size=120) as writer:
            writer.add_document(generator.integers(0, 120, 50 * 16 + 1).tolist())
            writer.finish()
    phases = [
        {"name": name, "train_tokens": tokens, "data_path": [str(root / name)]}
        for name, tokens in (("one", 18 * 16 - 3), ("two", 22 * 16))
    ]
    path = root / "phases.yaml"
    path.write_text(json.dumps({"phases": phases}))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("batches")
    phases = write_phases(root)
    small: dict[str, Any] = {**IN_TOKENS, "global-batch-size": 4, "exit-interval": 4}
    mixed: dict[str, Any] = {**small, "lr-warmup-iters": 2}
    del mixed["lr-warmup-tokens"]
    in_steps: dict[str, Any] = {"lr-decay-style": "constant", "micro-batch-size": 1}
    cases = {
        "small": case(**small, save=root / "small"),
        "mixed": case(**mixed, save=root / "mixed"),
        "steps": case(
            **in_steps, train_iters=10, global_batch_size=4, exit_interval=4, save=root / "steps"
        ),
        "phases": case(recipe=phases, **{**small, "exit-interval": 3}, save=root / "phases"),
        "ramp": case(**RAMP, save=root / "ramp", save_interval=3),
    }
    again: dict[str, Any] = {"exit-interval": 100}
    for batch in (2, 4, 8):
        cases[f"small_to_{batch}"] = case(
            **{**small, **again, "global-batch-size": batch}, load=root / "small"
        )
        cases[f"phases_to_{batch}"] = case(
            recipe=phases, **{**small, **again, "global-batch-size": batch}, load=root / "phases"
        )
    tail = {"lr-wsd-decay-style": "linear", "lr-wsd-decay-tokens": 256, "micro-batch-size": 1}
    branch: dict[str, Any] = {**tail, "anneal-from": 4, "load": root / "small", "min-lr": 0.0}
    branch["save"] = root / "branch"
    cases["branch"] = case(**branch, global_batch_size=4, exit_interval=6)
    cases["branch_to_8"] = case(**branch, global_batch_size=8)
    keep: dict[str, Any] = {**small, **again, "lr-warmup-tokens": 128, "global-batch-size": 8}
    cases["mixed_kept"] = case(**keep, load=root / "mixed")
    cases["mixed_to_8"] = case(**{**mixed, **again, "global-batch-size": 8}, load=root / "mixed")
    cases["steps_to_8"] = case(**in_steps, train_iters=10, load=root / "steps")
    cases["ramp_resumed"] = case(**RAMP, load=root / "ramp", ckpt_step=3)
    found = run_cases(1, cases, root / "one_rank")
    two = run_cases(2, {"ramp_on_2": case(**RAMP, load=root / "ramp", ckpt_step=3)}, root / "two")
    return {**found, **two}


def curve(tokens: float, warmup: int = 192) -> float:
    """The learning rate after so many tokens: a warm-up, then half a cosine."""
    if tokens < warmup:
        return 0.003 * tokens / warmup
    done = min(1.0, (tokens - warmup) / (TOKENS - warmup))
    return float(0.0003 + 0.0027 * (1 + np.cos(np.pi * done)) / 2)


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_run_resumed_with_another_batch_ends_at_its_tokens(
    batch: int, outcomes: dict[str, Outcome]
) -> None:
    found = outcomes[f"small_to_{batch}"]
    assert found.error is None, found.error
    steps = (TOKENS - FIRST) // (16 * batch)
    assert found.series("iteration")[:steps] == list(range(5, 5 + steps))
    consumed = found.series("consumed_tokens")[:steps]
    assert consumed == [FIRST + 16 * batch * step for step in range(1, steps + 1)]
    assert consumed[-1] == TOKENS
    assert found.series("global_batch_size") == [batch] * steps
    before = [FIRST, *consumed[:-1]]
    expected = [curve(tokens) for tokens in before]
    assert found.series("learning_rate") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_each_phase_gets_its_tokens_whatever_the_batch(
    batch: int, outcomes: dict[str, Outcome]
) -> None:
    found = outcomes[f"phases_to_{batch}"]
    assert found.error is None, found.error
    last = found.records[-1]
    assert last["consumed_samples_per_source"]["one"] == 18
    # 28 sequences were left, in whole steps; the last one is filled from the last phase.
    steps = -(-28 // batch)
    assert last["iteration"] == 3 + steps
    assert last["consumed_samples_per_source"]["two"] == 12 + steps * batch - 18
    assert last["consumed_samples"] == 12 + steps * batch


def test_schedule_that_another_batch_changes_is_refused_with_the_flag_that_keeps_it(
    outcomes: dict[str, Outcome],
) -> None:
    error = outcomes["mixed_to_8"].error
    assert error is not None
    assert (
        "--lr-warmup-tokens: checkpoint 128, this run 256 (the global batch was 4 sequences and is"
        " 8 now, so a length in steps is another one in tokens; to keep the checkpoint's curve give"
        " --lr-warmup-tokens 128)" in error
    )


def test_flag_that_the_refusal_names_keeps_the_curve(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["mixed_kept"]
    assert found.error is None, found.error
    rates = [curve(FIRST + 128 * step, warmup=128) for step in range(3)]
    assert found.series("learning_rate") == pytest.approx(rates, rel=1e-12)


def test_branch_in_tokens_ends_with_its_tail_whatever_the_batch(
    outcomes: dict[str, Outcome],
) -> None:
    """16 sequences after the trunk's 16: two steps of four, then one of eight."""
    begun, found = outcomes["branch"], outcomes["branch_to_8"]
    assert found.error is None, found.error
    assert begun.series("iteration")[:2] == [5, 6] and found.series("iteration")[0] == 7
    assert found.records[-1]["iteration"] == 7
    assert found.records[-1]["consumed_samples"] == 32
    peak = curve(FIRST)
    rates = begun.series("learning_rate") + found.series("learning_rate")
    assert rates == pytest.approx([peak, 0.75 * peak, 0.5 * peak], rel=1e-12)


def test_length_in_steps_stays_so(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["steps_to_8"]
    assert found.series("iteration")[:6] == [5, 6, 7, 8, 9, 10]
    assert found.series("consumed_samples")[:6] == [16 + 8 * step for step in range(1, 7)]


def test_ramp_up_grows_by_samples_and_resumes_to_the_bit(outcomes: dict[str, Outcome]) -> None:
    whole, resumed = outcomes["ramp"], outcomes["ramp_resumed"]
    assert whole.series("global_batch_size") == SIZES
    taken = list(np.cumsum(SIZES))
    assert whole.series("consumed_samples")[: len(SIZES)] == taken
    assert BatchPlan(full=8, start=2, increment=2, ramp_samples=12).steps_until(40) == len(SIZES)
    rates = [0.003 * min(1.0, before * 16 / 128) for before in (0, 2, 4)]
    assert whole.series("learning_rate")[:3] == pytest.approx(rates, rel=1e-12)
    for key in ("lm_loss", "grad_norm", "learning_rate", "global_batch_size", "consumed_tokens"):
        assert resumed.series(key)[:5] == whole.series(key)[3:8], key
    for key, expected in whole.weights.items():
        assert torch.equal(resumed.weights[key], expected), key


def test_ramp_up_goes_on_with_another_number_of_ranks(outcomes: dict[str, Outcome]) -> None:
    whole, found = outcomes["ramp"], outcomes["ramp_on_2"]
    assert found.error is None, found.error
    assert found.series("global_batch_size") == SIZES[3:]
    # fp32 sums in another order, as in test_parity.py.
    assert found.series("lm_loss") == pytest.approx(whole.series("lm_loss")[3:], rel=1e-5)
