"""Which schedule a resumed run may follow, and what a branch begins with."""

import logging
import re
from typing import Any

import pytest

from megatron.trainer.config.batch_plan import BatchChange, Progress
from megatron.trainer.errors import CheckpointError
from megatron.trainer.optim.scheduler import branch_rate, check_schedule, rate_of_branch
from megatron.trainer.optim.schedules import Schedule

VALUES: dict[str, Any] = {
    "style": "WSD",
    "peak": 1e-3,
    "final": 1e-4,
    "warmup": 5,
    "warmup_init": 0.0,
    "decay_end": 100,
    "tail": "geometric",
    "tail_length": 20,
}


def state(**changes: Any) -> dict[str, Any]:
    return dict(Schedule(**{**VALUES, **changes}).state_dict())


def check(wanted: dict[str, Any], iteration: int, *, override: bool = False) -> None:
    check_schedule(wanted, state(), iteration=iteration, override=override)


def test_the_same_schedule_goes_on_at_any_step() -> None:
    for iteration in (0, 79, 80, 100, 1000):
        check(state(), iteration)


@pytest.mark.parametrize(
    "changes",
    [{"decay_end": 150}, {"tail_length": 10}, {"tail_length": 20, "decay_end": 90}],
)
def test_decay_that_has_not_begun_can_be_moved(
    changes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Later, or earlier but still to come; the steps done have the same rates under both."""
    moved = Schedule(**{**VALUES, **changes})
    begin = moved.decay_end - moved.tail_length
    last = min(80, begin)
    with caplog.at_level(logging.INFO):
        check(dict(moved.state_dict()), last)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"the decay begins at step {begin} instead of 80, which is still to come: --lr-"
    )
    assert [moved(step) for step in range(last + 1)] == [
        Schedule(**VALUES)(step) for step in range(last + 1)
    ]
    with pytest.raises(CheckpointError, match="it can be moved only before it begins"):
        check(dict(moved.state_dict()), last + 1)


def test_decay_that_would_begin_before_the_checkpoint_is_refused() -> None:
    message = (
        "the checkpoint follows another learning-rate schedule: --lr-wsd-decay-iters: checkpoint"
        " 20, this run 40 (the decay would begin at step 60, the checkpoint's at 80, and 70 steps"
        " are done: it can be moved only before it begins, to a step still to come). Give this run"
        " the checkpoint's values (--lr-decay-iters is --train-iters where it is not given), follow"
        " this run's from here on with --override-schedule, or start a new schedule from the"
        " weights with --finetune"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        check(state(tail_length=40), 70)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"peak": 2e-3}, "--lr: checkpoint 0.001, this run 0.002"),
        ({"final": 2e-4}, "--min-lr: checkpoint 0.0001, this run 0.0002"),
        ({"warmup": 6}, "--lr-warmup-iters: checkpoint 5, this run 6"),
        ({"tail": "linear"}, "--lr-wsd-decay-style: checkpoint geometric, this run linear"),
        (
            {"style": "constant"},
            "--lr-decay-iters: checkpoint 100, this run None; --lr-decay-style: checkpoint WSD,"
            " this run constant; --lr-wsd-decay-iters: checkpoint 20, this run None;"
            " --lr-wsd-decay-style: checkpoint geometric, this run None; --min-lr: checkpoint"
            " 0.0001, this run None",
        ),
    ],
)
def test_another_shape_is_refused_or_told_when_it_is_taken(
    changes: dict[str, Any], flag: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = f"the checkpoint follows another learning-rate schedule: {flag}. Give this run"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        check(state(**changes), 3)
    check(state(**changes), 3, override=True)
    (record,) = caplog.records
    assert record.getMessage() == f"--override-schedule from iteration 3 on: {flag}"
    assert record.levelno == logging.WARNING


def test_a_cosine_that_was_planned_shorter_is_refused_from_the_start() -> None:
    wanted, saved = (state(style="cosine", decay_end=end) for end in (200, 100))
    with pytest.raises(CheckpointError, match=r"--lr-decay-iters: checkpoint 100, this run 200\. "):
        check_schedule(wanted, saved, iteration=1, override=False)


@pytest.mark.parametrize("rate", [None, 0.0, -1e-4, "1e-4", 1])
def test_checkpoint_without_a_rate_is_no_trunk(rate: object) -> None:
    message = (
        f"here says that its next learning rate is {rate}; a branch begins with it, so it must be a"
        " number above 0; branch from another checkpoint"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        branch_rate({"learning_rate": rate}, where="here")
    assert branch_rate({"learning_rate": 2e-4}, where="here") == 2e-4


def test_branch_knows_its_own_checkpoints() -> None:
    saved = {"anneal_from": 7, "anneal_lr": 2e-4}
    assert rate_of_branch(saved, anneal_from=7, where="here") == 2e-4
    rest = (
        ", and --anneal-from is 8; a branch has a directory of its own and the same --anneal-from"
        " for as long as it runs; give --save another directory"
    )
    with pytest.raises(CheckpointError, match=re.escape(f"here is of a branch from step 7{rest}")):
        rate_of_branch(saved, anneal_from=8, where="here")
    with pytest.raises(
        CheckpointError, match=re.escape(f"here is of a run that is no branch{rest}")
    ):
        rate_of_branch(state(), anneal_from=8, where="here")


def batches(*, steps: int, saved: int | None, now: int, samples: int | None = None) -> BatchChange:
    taken = steps * (saved or now) if samples is None else samples
    done = Progress(iteration=steps, samples=taken, own_samples=taken, seq_length=16)
    return BatchChange(progress=done, first=0, saved=saved, now=now)


def cosine(unit: str, warmup: int, end: int) -> dict[str, Any]:
    values = {**VALUES, "style": "cosine", "unit": unit, "warmup": warmup, "decay_end": end}
    return dict(Schedule(**values).state_dict())


@pytest.mark.parametrize("now", [4, 8, 2])
def test_curve_of_a_run_in_steps_goes_on_in_tokens(now: int) -> None:
    """As a run of a version that counted steps: 5 and 100 of them, of 4 x 16 tokens, rounded up."""
    saved, wanted = cosine("iters", 5, 100), cosine("tokens", 300, 6_350)
    check_schedule(
        wanted, saved, iteration=9, override=False, batch=batches(steps=9, saved=4, now=now)
    )
    other = cosine("tokens", 300, 6_336)
    with pytest.raises(CheckpointError, match="--lr-decay-iters: checkpoint 100, this run 99"):
        check_schedule(
            other, saved, iteration=9, override=False, batch=batches(steps=9, saved=4, now=now)
        )


def test_curve_in_tokens_goes_on_in_steps_while_all_had_this_batch() -> None:
    saved, wanted = cosine("tokens", 320, 6_400), cosine("iters", 5, 100)
    same = batches(steps=9, saved=4, now=4)
    check_schedule(wanted, saved, iteration=9, override=False, batch=same)
    # Here 9 steps are not 9 x 4 x 16 tokens: the curve would jump.
    varied = batches(steps=9, saved=4, now=4, samples=50)
    with pytest.raises(CheckpointError, match="--lr-decay-tokens: checkpoint 6400, this run None"):
        check_schedule(wanted, saved, iteration=9, override=False, batch=varied)


@pytest.mark.parametrize(
    ("saved", "wanted", "told", "remedy"),
    [
        (
            cosine("tokens", 320, 6_400),
            cosine("tokens", 640, 6_400),
            "--lr-warmup-tokens: checkpoint 320, this run 640",
            "--lr-warmup-tokens 320",
        ),
        (
            cosine("iters", 5, 100),
            cosine("iters", 5, 50),
            "--lr-decay-iters: checkpoint 100, this run 50",
            "--lr-decay-tokens 6400",
        ),
    ],
)
def test_refusal_names_the_batch_that_made_it_another_curve(
    saved: dict[str, Any], wanted: dict[str, Any], told: str, remedy: str
) -> None:
    message = (
        f"the checkpoint follows another learning-rate schedule: {told} (the global batch was 4"
        " sequences and is 8 now, so a length in steps is another one in tokens; to keep the"
        f" checkpoint's curve give {remedy}). Give this run the"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        check_schedule(
            wanted, saved, iteration=9, override=False, batch=batches(steps=9, saved=4, now=8)
        )
    with pytest.raises(CheckpointError) as caught:
        check_schedule(
            wanted, saved, iteration=9, override=False, batch=batches(steps=9, saved=4, now=4)
        )
    assert "global batch" not in str(caught.value)


def test_decay_in_tokens_can_be_moved_before_it_begins() -> None:
    """At the end of the stable phase, token 5,120, and a step after it."""
    tokens = {"unit": "tokens", "warmup": 320, "tail_length": 1_280}
    saved, wanted = state(**tokens, decay_end=6_400), state(**tokens, decay_end=9_600)
    early, late = (batches(steps=steps, saved=4, now=8) for steps in (80, 81))
    check_schedule(wanted, saved, iteration=80, override=False, batch=early)
    with pytest.raises(
        CheckpointError, match="at token 8320, the checkpoint's at 5120, and 5184 t"
    ):
        check_schedule(wanted, saved, iteration=81, override=False, batch=late)
