"""Learning-rate schedules against closed forms, with OLMoE's own numbers."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from megatron.trainer.optim.schedules import (
    DECAYS,
    Anneal,
    Schedule,
    cosine,
    exponential,
    linear,
    minus_sqrt,
    register_decay,
)

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
        "warmup": WARM_UP,
        "warmup_init": FINAL,
        "decay_end": END,
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
    schedule = olmoe(warmup=5, decay_end=40)
    for step in range(60):
        if step < 5:
            expected = FINAL + (PEAK - FINAL) * step / 5
        elif step < 40:
            expected = FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * (step - 5) / 35)) / 2
        else:
            expected = FINAL
        assert schedule(step) == pytest.approx(expected, rel=REL), step


def test_linear_decay_is_a_straight_line() -> None:
    schedule = olmoe(style="linear", peak=1.0, final=0.2, warmup=0, decay_end=8)
    found = [schedule(step) for step in range(10)]
    assert found == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2], rel=REL)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    schedule = olmoe(style="constant", warmup_init=0.0, warmup=4, decay_end=8)
    found = [schedule(step) for step in (0, 1, 3, 4, 8, 100)]
    assert found == pytest.approx([0.0, PEAK / 4, PEAK * 3 / 4, PEAK, PEAK, PEAK], rel=REL)


def test_warm_up_up_to_the_end_of_the_decay_ends_at_the_final_rate() -> None:
    schedule = olmoe(warmup=4, decay_end=4)
    assert schedule(3) == pytest.approx(FINAL + (PEAK - FINAL) * 3 / 4, rel=REL)
    assert schedule(4) == FINAL


@pytest.mark.parametrize("decay", [cosine, linear, exponential, minus_sqrt])
def test_decay_goes_from_1_to_0_and_never_rises(decay: Any) -> None:
    shares = [decay(index / 100) for index in range(101)]
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert shares == sorted(shares, reverse=True)


def test_unknown_style_is_refused_with_the_nearest_name() -> None:
    message = (
        "unknown lr_decay_style 'cosin'; known: WSD, constant, cosine, exponential, geometric,"
        " linear, minus_sqrt; did you mean 'cosine'?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        olmoe(style="cosin")


@pytest.mark.usefixtures("restored_decays")
def test_registered_decay_shapes_the_schedule() -> None:
    register_decay("square_root", lambda done: 1.0 - math.sqrt(done))
    schedule = olmoe(style="square_root", peak=1.0, final=0.0, warmup=0, decay_end=100)
    assert schedule(25) == pytest.approx(0.5, rel=REL)


@pytest.mark.usefixtures("restored_decays")
def test_taken_name_is_refused_and_keeps_its_decay() -> None:
    with pytest.raises(ValueError, match=r"^lr_decay_style 'cosine' is already registered as "):
        register_decay("cosine", linear)
    assert DECAYS["cosine"] is cosine


@pytest.mark.parametrize("name", ["WSD", "geometric"])
def test_built_in_name_cannot_be_registered(name: str) -> None:
    with pytest.raises(ValueError, match=f"^lr_decay_style '{name}' is built in; choose another"):
        register_decay(name, linear)


# JetMoE at 4,194,304 tokens a step: 10B of warm-up, 1,000B in all before the decay, 250B of decay;
# both ends at a tenth of the peak.
JETMOE_PEAK, JETMOE_END = 5.0e-4, 5.0e-5


def jetmoe(tail: str | None = "geometric", **changes: Any) -> Schedule:
    values: dict[str, Any] = {
        "style": "WSD",
        "peak": JETMOE_PEAK,
        "final": JETMOE_END,
        "warmup": 2_385,
        "warmup_init": JETMOE_END,
        "decay_end": 298_024,
        "tail": tail,
        "tail_length": 59_605,
    }
    return Schedule(**{**values, **changes})


def closed_form(tail: str, done: float, peak: float, final: float) -> float:
    if tail == "geometric":
        return float(math.exp(math.log(peak) + done * math.log(final / peak)))
    left = {
        "linear": 1 - done,
        "cosine": math.cos(math.pi * done / 2) ** 2,
        "minus_sqrt": 1 - done**0.5,
        "exponential": 2 ** (1 - done) - 1,
        "constant": 1.0,
    }[tail]
    return peak * left + final * (1 - left)


TAILS = ("geometric", "linear", "cosine", "minus_sqrt", "exponential", "constant")
# The closed forms are spelled otherwise: log and exp instead of powers, squares instead of halves.
TAIL_REL = 1e-12


@pytest.mark.parametrize("tail", TAILS)
def test_wsd_is_warm_up_peak_and_tail_at_every_step(tail: str) -> None:
    schedule = jetmoe(tail, warmup=4, decay_end=22, tail_length=12)
    for step in range(30):
        if step < 4:
            expected = JETMOE_END + (JETMOE_PEAK - JETMOE_END) * step / 4
        elif step < 10:
            expected = JETMOE_PEAK
        else:
            done = min(1.0, (step - 10) / 12)
            expected = closed_form(tail, done, JETMOE_PEAK, JETMOE_END)
        assert schedule(step) == pytest.approx(expected, rel=TAIL_REL), step


@pytest.mark.parametrize("tail", TAILS)
def test_branch_has_the_tail_from_the_rate_it_began_with(tail: str) -> None:
    branch = Anneal(start=1_000, peak=3e-4, final=1e-5, tail=tail, tail_length=12)
    for step in range(12):
        expected = closed_form(tail, step / 12, 3e-4, 1e-5)
        assert branch(1_000 + step) == pytest.approx(expected, rel=TAIL_REL), step
    if tail != "constant":
        assert branch(1_012) == pytest.approx(1e-5, rel=TAIL_REL)
        assert branch(1_500) == branch(1_012)


def test_branch_at_the_end_of_the_stable_phase_is_bitwise_the_wsd_schedule() -> None:
    for tail in TAILS:
        whole = jetmoe(tail, warmup=4, decay_end=22, tail_length=12)
        branch = Anneal(start=10, peak=whole(10), final=JETMOE_END, tail=tail, tail_length=12)
        assert [branch(step) for step in range(10, 30)] == [whole(step) for step in range(10, 30)]


@pytest.mark.parametrize(
    ("tail", "quarters"),
    [
        ("exponential", (0.714, 0.473, 0.270)),
        ("linear", (0.775, 0.550, 0.325)),
        ("cosine", (0.868, 0.550, 0.232)),
        ("minus_sqrt", (0.550, 0.364, 0.221)),
        ("geometric", (0.562, 0.316, 0.178)),
    ],
)
def test_tails_towards_a_tenth_have_the_published_values(
    tail: str, quarters: tuple[float, ...]
) -> None:
    branch = Anneal(start=0, peak=1.0, final=0.1, tail=tail, tail_length=4)
    # Given to three decimals.
    assert [branch(step) for step in (1, 2, 3)] == pytest.approx(quarters, abs=5e-4)


def test_jetmoe_schedule_has_the_papers_values() -> None:
    schedule = jetmoe()
    assert schedule(0) == JETMOE_END
    assert {schedule(step) for step in (2_385, 100_000, 298_024 - 59_605)} == {JETMOE_PEAK}
    half_life = 59_605 * math.log10(2)
    assert schedule(238_419 + round(half_life)) == pytest.approx(JETMOE_PEAK / 2, rel=1e-4)
    assert schedule(298_024) == schedule(300_000) == JETMOE_END


def test_olmoe_anneal_is_a_line_from_where_the_cosine_stands_to_0() -> None:
    branch = Anneal(
        start=1_200_000, peak=olmoe()(1_200_000), final=0.0, tail="linear", tail_length=23_842
    )
    assert branch(1_200_000) == pytest.approx(4.0e-5, rel=REL)
    assert branch(1_200_000 + 11_921) == pytest.approx(2.0e-5, rel=REL)
    assert branch(1_223_842) == 0.0


@pytest.mark.usefixtures("restored_decays")
def test_registered_decay_serves_as_a_tail() -> None:
    register_decay("square", lambda done: (1.0 - done) ** 2)
    assert jetmoe("square", peak=1.0, final=0.0, tail_length=2)(298_023) == 0.25


@pytest.mark.parametrize(("peak", "final"), [(5e-4, 0.0), (5e-4, -1e-5)])
def test_geometric_tail_to_nothing_is_refused(peak: float, final: float) -> None:
    message = (
        f"lr_wsd_decay_style 'geometric' goes from a learning rate of 0.0005 to min_lr ({final:g})"
        " by the same factor at every step, which 0 cannot be part of; give a min_lr above 0"
        " (JetMoE: a tenth of the peak), or take linear to reach 0"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jetmoe(final=final)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Anneal(start=3, peak=peak, final=final, tail="geometric", tail_length=2)
    with pytest.raises(ValueError, match=r"^lr_decay_style 'geometric' goes from"):
        olmoe(style="geometric", final=final)


def test_unknown_tail_is_refused_with_the_nearest_name() -> None:
    message = (
        "unknown lr_wsd_decay_style 'minus-sqrt'; known: constant, cosine, exponential, geometric,"
        " linear, minus_sqrt; did you mean 'minus_sqrt'?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jetmoe("minus-sqrt")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Anneal(start=0, peak=1.0, final=0.1, tail="minus-sqrt", tail_length=1)


def test_wsd_without_a_tail_is_refused() -> None:
    message = (
        "lr_decay_style WSD needs lr_wsd_decay_style (None), the shape of its decay; use one of"
        " constant, cosine, exponential, geometric, linear, minus_sqrt"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jetmoe(None)


@pytest.mark.parametrize("tail_length", [0, 295_640])
def test_tail_that_does_not_fit_is_refused(tail_length: int) -> None:
    message = (
        f"lr_wsd_decay_iters ({tail_length}) must be 1 to 295639, the steps between the warm-up"
        " (lr_warmup_iters 2385) and the end of the decay (lr_decay_iters or train_iters, 298024);"
        " change one of the three"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        jetmoe(tail_length=tail_length)


def test_branch_that_would_rise_is_refused() -> None:
    message = (
        "min_lr (4e-05) is above the learning rate that the branch begins with (1e-05, that of step"
        " 7 of the run it branches from); a decay must not rise; lower --min-lr"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Anneal(start=7, peak=1e-5, final=4e-5, tail="linear", tail_length=2)


FLAGS = {
    "style": "lr_decay_style",
    "peak": "lr",
    "final": "min_lr",
    "warmup": "lr_warmup_iters",
    "warmup_init": "lr_warmup_init",
    "decay_end": "lr_decay_iters",
}


def test_state_tells_two_schedules_apart_by_every_field_under_its_flag() -> None:
    state = olmoe().state_dict()
    others = {
        "style": "linear",
        "peak": 5e-4,
        "final": 0.0,
        "warmup": 2_000,
        "warmup_init": 0.0,
        "decay_end": 5_000,
    }
    tail = {"tail", "tail_length"}
    assert {*others, *tail} == {*FLAGS, *tail}
    assert {*FLAGS, *tail, "unit"} == {field.name for field in dataclasses.fields(Schedule)}
    assert state.keys() == set(FLAGS.values())
    for name, value in others.items():
        assert olmoe(**{name: value}).state_dict() == {**state, FLAGS[name]: value}


def test_a_constant_schedule_can_be_made_longer() -> None:
    short = olmoe(style="constant", decay_end=3_000).state_dict()
    assert short == olmoe(style="constant", decay_end=5_000, final=1e-6).state_dict()
    assert short != olmoe(style="constant", peak=5e-4).state_dict()


def test_state_of_wsd_tells_tails_apart_and_other_styles_ignore_theirs() -> None:
    state = jetmoe().state_dict()
    assert state["lr_wsd_decay_style"] == "geometric"
    assert state["lr_wsd_decay_iters"] == 59_605
    assert jetmoe("linear").state_dict() == {**state, "lr_wsd_decay_style": "linear"}
    assert jetmoe(tail_length=7).state_dict() == {**state, "lr_wsd_decay_iters": 7}
    assert olmoe(tail="linear", tail_length=5).state_dict() == olmoe().state_dict()


def test_state_tells_two_branches_apart_by_every_field() -> None:
    values: dict[str, Any] = {
        "start": 5,
        "peak": 1e-4,
        "final": 1e-5,
        "tail": "linear",
        "tail_length": 3,
    }
    names = {
        "start": ("anneal_from", 6),
        "peak": ("anneal_lr", 2e-4),
        "final": ("min_lr", 0.0),
        "tail": ("lr_wsd_decay_style", "geometric"),
        "tail_length": ("lr_wsd_decay_iters", 4),
    }
    state = Anneal(**values).state_dict()
    assert {*names, "unit"} == {field.name for field in dataclasses.fields(Anneal)}
    for name, (flag, value) in names.items():
        changed: dict[str, Any] = {**values, name: value}
        assert Anneal(**changed).state_dict() == {**state, flag: value}
