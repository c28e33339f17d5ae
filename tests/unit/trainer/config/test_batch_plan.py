"""Batches of a ramp-up against Megatron-LM's own count and against a plain loop over steps."""

import random
from typing import Any

import pytest
from megatron.core import num_microbatches_calculator

from megatron.trainer.config.batch_plan import BatchPlan, Progress, RunPlan, batch_plan
from megatron.trainer.config.durations import run_plan
from megatron.trainer.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron.trainer.config.validate import size_problems, validate
from megatron.trainer.errors import ConfigError
from moe_app.pretrain.config import PretrainConfig

RAMPS = [(16, 2, 2, 56), (8, 2, 2, 12), (1024, 256, 256, 3_000_000), (12, 3, 9, 50)]
"""Full batch, START, INCREMENT, SAMPLES; the shares of SAMPLES are whole numbers."""


def ramp(full: int, start: int, increment: int, samples: int) -> BatchPlan:
    training = TrainingConfig(
        global_batch_size=full, rampup_batch_size=(start, increment, samples), seq_length=16
    )
    return batch_plan(training)


@pytest.mark.parametrize("sizes", RAMPS)
def test_batch_is_megatrons_after_every_number_of_samples(sizes: tuple[int, ...]) -> None:
    full, start, increment, samples = sizes
    if not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("megatron-core 0.19 has no ramp by increments any more")
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 0, start, increment, samples
    )
    stride = max(1, samples // 500)
    for consumed in range(0, samples + 3 * stride, stride):
        theirs.update(consumed, consistency_check=True)
        found = ramp(*sizes).size_at(consumed)
        assert found == theirs.get_current_running_global_batch_size(), consumed


def test_uneven_shares_are_rounded_up_to_whole_samples() -> None:
    """Three increments over 10 samples: after 3 1/3, 6 2/3 and 10 of them."""
    sizes = [ramp(8, 2, 2, 10).size_at(samples) for samples in range(12)]
    assert sizes == [2, 2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8]


def by_steps(plan: BatchPlan, samples: int, steps: int) -> list[int]:
    """Samples before each step, one step after the other."""
    found = [samples]
    for _ in range(steps):
        found.append(found[-1] + plan.size_at(found[-1]))
    return found


@pytest.mark.parametrize("plan", [*(ramp(*sizes) for sizes in RAMPS), BatchPlan(full=6, start=6)])
def test_steps_and_samples_are_those_of_a_loop_over_steps(plan: BatchPlan) -> None:
    generator = random.Random(3)
    for _ in range(30):
        samples = generator.randrange(0, plan.ramp_samples + 5 * plan.full, 2)
        counts = by_steps(plan, samples, 60)
        for steps in (0, 1, 7, 60):
            assert plan.samples_after(steps, samples) == counts[steps]
        wanted = generator.randrange(samples, counts[-1])
        first = next(number for number, count in enumerate(counts) if count >= wanted)
        assert plan.steps_until(wanted, samples) == first


def progress(iteration: int, samples: int, own: int | None = None) -> Progress:
    return Progress(
        iteration=iteration,
        samples=samples,
        own_samples=samples if own is None else own,
        seq_length=16,
    )


def config(**training: Any) -> RunConfig:
    return RunConfig(training=TrainingConfig(seq_length=16, **training))


@pytest.mark.parametrize("batch", [1, 3, 4, 8, 100])
def test_run_in_tokens_ends_at_them_whatever_the_batch_until_then(batch: int) -> None:
    """Forty samples were planned; ten steps of two are done, as nobody planned."""
    plan = run_plan(config(train_iters=10, train_tokens=625, global_batch_size=batch))
    done = progress(10, 20)
    left = plan.steps_left(done)
    assert left == -(-20 // batch)
    assert plan.last_iteration(done) == 10 + left
    assert plan.samples_left(done) == left * batch
    for steps in range(left + 2):
        now = progress(10 + steps, 20 + steps * batch)
        assert plan.is_done(now) == (now.tokens >= 625)
        assert plan.is_done(now) == (steps >= left)


def test_run_in_steps_ends_after_them_whatever_the_batch() -> None:
    plan = run_plan(config(train_iters=10, global_batch_size=4))
    assert [plan.is_done(progress(steps, 1)) for steps in (9, 10, 11)] == [False, True, True]
    assert plan.last_iteration(progress(3, 99)) == 10


def test_branch_in_tokens_counts_its_own() -> None:
    plan = RunPlan(batches=BatchPlan(full=4, start=4), train_iters=1, samples=12)
    assert plan.last_iteration(progress(50, 1_000, own=0)) == 53
    assert not plan.is_done(progress(52, 1_011, own=11))
    assert plan.is_done(progress(53, 1_012, own=12))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            (4, 4),
            "rampup_batch_size (4 4) must be three numbers of at least 1: the first global batch,"
            " the increment, and the samples until global_batch_size is reached; use 16 16 100000,"
            " for example",
        ),
        (
            (32, 4, 100),
            "rampup_batch_size (32 4 100) begins with a global batch of 32, which must be below"
            " global_batch_size (32); begin with less, or leave the ramp-up out",
        ),
        (
            (8, 10, 100),
            "rampup_batch_size (8 10 100) grows by 10, which must divide global_batch_size - 8 (32"
            " - 8 = 24); use another increment, or begin with 12",
        ),
        (
            (2, 10, 100),
            "rampup_batch_size (2 10 100): its first global batch (2) must be a multiple of 4, what"
            " the layout divides every global batch by (micro_batch_size x data parallel size, and"
            " x pipeline stages where they are interleaved); use 4",
        ),
    ],
)
def test_impossible_ramp_up_is_refused(values: tuple[int, ...], message: str) -> None:
    training = TrainingConfig(global_batch_size=32, micro_batch_size=2, rampup_batch_size=values)
    cfg = PretrainConfig(training=training, parallel=ParallelConfig(device="cpu"))
    with pytest.raises(ConfigError) as caught:
        validate(cfg, 2)
    assert message in str(caught.value)
    if values == (2, 10, 100):
        assert "its increment (10) must be a multiple of 4" in str(caught.value)
        validate(cfg, 1)


def test_a_ramp_up_of_no_batch_is_left_to_the_other_message() -> None:
    found = size_problems(config(global_batch_size=0, rampup_batch_size=(1, 1, 1)))
    assert found == ["global_batch_size (0) must be at least 1; use 1 or more"]
