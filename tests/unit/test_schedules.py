"""Learning-rate schedules against closed forms, with OLMoE's own numbers."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from moe_ext.schedules import DECAYS, Schedule, cosine, linear, register_decay

PEAK, FINAL = 4.0e-4, 4.0e-5
WARM_UP, END = 2_500, 1_192_093

# Both sides are a handful of fp64 operations on numbers near 1e-4.
REL = 1e-12


def olmoe(**changes: Any) -> Schedule:
    """OLMoE-1B-7B's schedule: it warms up from a tenth of the peak, not from 0."""
    values: dict[str, Any] = {
        "style": "cosine",
        "peak": PEAK,
        "final": FINAL,
        "warmup_iters": WARM_UP,
        "warmup_init": FINAL,
        "decay_iters": END,
    }
    return Schedule(**{**values, **changes})


@pytest.fixture
def restored_decays() -> Iterator[None]:
    before = dict(DECAYS)
    yield
    DECAYS.clear()
    DECAYS.update(before)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 4.0e-5),
        (1, 4.0e-5 + 3.6e-4 / 2_500),
        (1_250, 2.2e-4),
        (2_500, 4.0e-4),
        # A third of the way the cosine has covered a quarter of the height.
        (2_500 + (1_192_093 - 2_500) / 3, 4.0e-5 + 0.75 * 3.6e-4),
        ((1_192_093 + 2_500) / 2, 2.2e-4),
        (1_192_093, 4.0e-5),
        (1_192_094, 4.0e-5),
        (1_223_842, 4.0e-5),
    ],
)
def test_olmoe_schedule_has_the_papers_values(step: float, rate: float) -> None:
    assert olmoe()(step) == pytest.approx(rate, rel=REL)  # type: ignore[arg-type]


def test_olmoe_schedule_is_the_closed_form_at_every_step() -> None:
    schedule = olmoe(warmup_iters=5, decay_iters=40)
    for step in range(60):
        if step < 5:
            expected = FINAL + (PEAK - FINAL) * step / 5
        elif step < 40:
            expected = FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * (step - 5) / 35)) / 2
        else:
            expected = FINAL
        assert schedule(step) == pytest.approx(expected, rel=REL), step


def test_linear_decay_is_a_straight_line() -> None:
    schedule = olmoe(style="linear", peak=1.0, final=0.2, warmup_iters=0, decay_iters=8)
    found = [schedule(step) for step in range(10)]
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2], rel=REL)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    schedule = olmoe(style="constant", warmup_init=0.0, warmup_iters=4, decay_iters=8)
    found = [schedule(step) for step in (0, 1, 3, 4, 8, 100)]
    assert found == pytest.approx([0.0, PEAK / 4, PEAK * 3 / 4, PEAK, PEAK, PEAK], rel=REL)


def test_warm_up_up_to_the_end_of_the_decay_ends_at_the_final_rate() -> None:
    schedule = olmoe(warmup_iters=4, decay_iters=4)
    assert schedule(3) == pytest.approx(FINAL + (PEAK - FINAL) * 3 / 4, rel=REL)
    assert schedule(4) == FINAL


@pytest.mark.parametrize("decay", [cosine, linear])
def test_decay_goes_from_1_to_0_and_never_rises(decay: Any) -> None:
    shares = [decay(index / 100) for index in range(101)]
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert shares == sorted(shares, reverse=True)


def test_unknown_style_is_refused_with_the_nearest_name() -> None:
    message = (
        "unknown lr_decay_style 'cosin'; known: constant, cosine, linear; did you mean 'cosine'?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        olmoe(style="cosin")


@pytest.mark.usefixtures("restored_decays")
def test_registered_decay_shapes_the_schedule() -> None:
    register_decay("square_root", lambda done: 1.0 - math.sqrt(done))
    schedule = olmoe(style="square_root", peak=1.0, final=0.0, warmup_iters=0, decay_iters=100)
    assert schedule(25) == pytest.approx(0.5, rel=REL)


@pytest.mark.usefixtures("restored_decays")
def test_taken_name_is_refused_and_keeps_its_decay() -> None:
    with pytest.raises(ValueError, match=r"^lr_decay_style 'cosine' is already registered as "):
        register_decay("cosine", linear)
    assert DECAYS["cosine"] is cosine


FLAGS = {
    "style": "lr_decay_style",
    "peak": "lr",
    "final": "min_lr",
    "warmup_iters": "lr_warmup_iters",
    "warmup_init": "lr_warmup_init",
    "decay_iters": "lr_decay_iters",
}


def test_state_tells_two_schedules_apart_by_every_field_under_its_flag() -> None:
    state = olmoe().state_dict()
    others = {
        "style": "linear",
        "peak": 5e-4,
        "final": 0.0,
        "warmup_iters": 2_000,
        "warmup_init": 0.0,
        "decay_iters": 5_000,
    }
    assert others.keys() == FLAGS.keys() == {field.name for field in dataclasses.fields(Schedule)}
    assert state.keys() == set(FLAGS.values())
    for name, value in others.items():
        assert olmoe(**{name: value}).state_dict() == {**state, FLAGS[name]: value}


def test_a_constant_schedule_can_be_made_longer() -> None:
    short = olmoe(style="constant", decay_iters=3_000).state_dict()
    assert short == olmoe(style="constant", decay_iters=5_000, final=1e-6).state_dict()
    assert short != olmoe(style="constant", peak=5e-4).state_dict()
