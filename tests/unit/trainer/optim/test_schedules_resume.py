"""Which schedule a resumed run may follow, and what a branch begins with."""

import logging
import re
from typing import Any

import pytest

from megatron.trainer.errors import CheckpointError
from megatron.trainer.optim.scheduler import branch_rate, check_schedule, rate_of_branch
from megatron.trainer.optim.schedules import Schedule

VALUES: dict[str, Any] = {
    "style": "WSD",
    "peak": 1e-3,
    "final": 1e-4,
    "warmup_iters": 5,
    "warmup_init": 0.0,
    "decay_iters": 100,
    "tail": "geometric",
    "tail_iters": 20,
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
    [{"decay_iters": 150}, {"tail_iters": 10}, {"tail_iters": 20, "decay_iters": 90}],
)
def test_decay_that_has_not_begun_can_be_moved(
    changes: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Later, or earlier but still to come; the steps done have the same rates under both."""
    moved = Schedule(**{**VALUES, **changes})
    begin = moved.decay_iters - moved.tail_iters
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
        check(state(tail_iters=40), 70)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"peak": 2e-3}, "--lr: checkpoint 0.001, this run 0.002"),
        ({"final": 2e-4}, "--min-lr: checkpoint 0.0001, this run 0.0002"),
        ({"warmup_iters": 6}, "--lr-warmup-iters: checkpoint 5, this run 6"),
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
    wanted, saved = (state(style="cosine", decay_iters=end) for end in (200, 100))
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
