"""Ends of phases that lie within a step, and samples that count for a run's length."""

import pytest

from megatron.trainer.data.sampler import Phase
from megatron.trainer.errors import DataError
from tests.unit.trainer.data.test_sampler import (
    DECAY,
    STABLE,
    after,
    changed,
    draw,
    moved,
    stream,
)


def test_last_phase_fills_the_last_step_and_another_may_follow() -> None:
    """88 samples in steps of 16: the last one takes 8 more of the decay's mixture."""
    whole = stream()
    found = draw(whole, 6, global_batch_size=16)
    endless = stream(STABLE, changed(DECAY, num_samples=None))
    assert found == draw(endless, 6, global_batch_size=16)
    with pytest.raises(DataError, match=r"^all 2 phases are used up after 96 samples"):
        draw(whole, 1)
    # Begun again at its end, or continued with a third phase, nothing is read twice.
    assert stream().load_state_dict(moved(whole.state_dict())) == []
    third = Phase(name="third", sources=("web", "code", "math"), weights=(1, 1, 1), num_samples=8)
    longer = stream(STABLE, DECAY, third)
    longer.load_state_dict(moved(whole.state_dict()))
    rest = draw(longer, 1)
    assert longer.phase == "third"
    counts = [
        after - before
        for before, after in zip(
            whole.consumed_per_source().values(), longer.consumed_per_source().values(), strict=True
        )
    ]
    assert sorted(counts) == [2, 3, 3] and len(set(rest)) == 8


def test_phase_that_an_earlier_version_ended_with_a_whole_step_is_over() -> None:
    """44 tokens of 4 are 11 samples; that version drew 16 and then began the next phase."""
    rounded = changed(STABLE, num_samples=16)
    exact = changed(STABLE, num_samples=11, whole_steps=16)
    resumed = stream(exact, DECAY)
    assert resumed.load_state_dict(after(3, rounded, DECAY)) == []
    assert draw(resumed, 2) == draw(stream(rounded, DECAY), 5)[24:]
    with pytest.raises(DataError, match="num_samples: checkpoint 16, this run 11"):
        stream(changed(exact, whole_steps=12), DECAY).load_state_dict(after(3, rounded, DECAY))


def test_samples_that_a_rewind_left_out_are_not_trained_on() -> None:
    drawn = stream()
    draw(drawn, 3)
    drawn.skip({"web": 5, "code": 2})
    draw(drawn, 1)
    assert (drawn.trained_samples, drawn.consumed_samples) == ((32, 32), 39)
    branch = stream(DECAY)
    branch.inherit(moved(drawn.state_dict()))
    draw(branch, 2)
    assert (branch.trained_samples, branch.consumed_samples) == ((48, 16), 55)
