"""Which steps are refused, by hand-made histories; what of it survives a checkpoint."""

import json
import math
import statistics

import pytest

from megatron.trainer.config.schema import ReliabilityConfig
from megatron.trainer.health.step_guard import MIN_HISTORY, StepGuard


def guard(**settings: float | bool) -> StepGuard:
    return StepGuard(ReliabilityConfig(**settings))  # type: ignore[arg-type]


def filled(count: int, **settings: float | bool) -> StepGuard:
    """A guard that took steps of loss 2, 4, 2, 4... and norm 1."""
    made = guard(**settings)
    for step in range(count):
        made.took(loss=2.0 if step % 2 == 0 else 4.0, norm=1.0)
    return made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_always_refused(value: float) -> None:
    assert guard().loss_problem(value) == f"loss is {value}"
    assert guard().norm_problem(value) == f"gradient norm is {value}"


def test_finite_numbers_pass_unless_spikes_are_looked_for() -> None:
    made = filled(100)
    assert not made.looks_for_spikes
    assert made.loss_problem(1e30) is None


def test_spike_is_above_the_mean_by_sigma_deviations() -> None:
    made = filled(20, spike_sigma=5.0)
    history = [2.0, 4.0] * 10
    limit = statistics.fmean(history) + 5 * statistics.pstdev(history)
    assert limit == 8.0
    assert made.loss_problem(8.0) is None
    assert made.loss_problem(8.001) == (
        "loss 8.001 is above 3 + 5 x 1, mean and deviation of the last 20 steps"
    )
    # Norms have a history of their own, of no deviation at all.
    assert made.norm_problem(1.0) is None
    assert made.norm_problem(1.001) is not None
    assert made.loss_problem(-100.0) is None


def test_short_history_refuses_nothing() -> None:
    assert filled(MIN_HISTORY - 1, spike_sigma=1.0).loss_problem(1e9) is None
    assert filled(MIN_HISTORY, spike_sigma=1.0).loss_problem(1e9) is not None


def test_steps_before_the_window_are_forgotten() -> None:
    made = filled(20, spike_sigma=5.0, spike_window=4)
    for _ in range(4):
        made.took(loss=100.0, norm=1.0)
    assert made.loss_problem(100.0) is None


def test_only_steps_in_a_row_are_counted() -> None:
    made = guard(max_skipped=2)
    assert [made.skip(), made.skip()] == [True, True]
    made.took(loss=1.0, norm=1.0)
    assert [made.skip(), made.skip(), made.skip()] == [True, True, False]
    assert not guard().skip()


def test_rewinds_to_each_checkpoint_are_counted() -> None:
    made = guard(rewind_on_spike=True, max_rewinds=2)
    assert [made.may_rewind(10) for _ in range(3)] == [True, True, False]
    assert made.may_rewind(20)
    assert made.rewinds == {10: 2, 20: 1}
    assert not guard().may_rewind(10)


def test_guard_restored_from_json_judges_as_the_original() -> None:
    settings = {"spike_sigma": 5.0, "max_skipped": 3, "rewind_on_spike": True, "max_rewinds": 1}
    first, second = filled(20, **settings), guard(**settings)
    first.took(loss=0.1 + 0.2, norm=1 / 3)
    assert first.skip() and first.skip() and first.may_rewind(5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    for value in (7.0, 8.0, 9.0):
        assert second.loss_problem(value) == first.loss_problem(value)
    assert [second.skip(), second.skip()] == [True, False]
    assert not second.may_rewind(5)


@pytest.mark.parametrize(
    "damage",
    [
        {"losses": None},
        {"losses": ["a"]},
        {"grad_norms": 3},
        {"skipped_in_row": "x"},
        {"rewinds": [[1]]},
        {"rewinds": 5},
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(damage: dict[str, object]) -> None:
    made = filled(20, spike_sigma=5.0)
    before = made.state_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        made.load_state_dict({**before, **damage})
    assert made.state_dict() == before
