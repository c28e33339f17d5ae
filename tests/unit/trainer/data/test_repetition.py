"""Check the rule against repetition with a plain quadratic reference, and at its borders."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.data.repetition import OLMOE_RULE, Repetition, RepetitionRule, find_repetition
from megatron.trainer.errors import ConfigError


def most_repeats(ids: list[int], period: int) -> int:
    """Extend a run from each token, one token at a time."""
    most = 0
    for start in range(len(ids) - period + 1):
        stop = start
        while stop + period < len(ids) and ids[stop] == ids[stop + period]:
            stop += 1
        most = max(most, (stop - start + period) // period)
    return most


def expected(ids: list[int], rule: RepetitionRule) -> tuple[int, int] | None:
    for period in range(rule.min_period, rule.max_period + 1):
        if (most := most_repeats(ids, period)) >= rule.repeats:
            return period, most
    return None


def found(ids: list[int], rule: RepetitionRule) -> tuple[int, int] | None:
    run = find_repetition(np.array(ids, np.int32), rule)
    return None if run is None else (run.period, run.repeats)


def test_same_as_the_quadratic_reference_on_generated_sequences() -> None:
    draw = random.Random(1)
    hits = 0
    for _ in range(3000):
        rule = RepetitionRule(repeats=draw.choice([2, 3, 5, 8]), max_period=draw.choice([1, 3, 13]))
        gram = draw.choices(range(draw.randint(1, 4)), k=draw.randint(1, 14))
        run = (gram * 10)[: draw.randint(0, 10 * len(gram))]
        noise = draw.choices(range(draw.randint(1, 4)), k=draw.randint(0, 50))
        cut = draw.randint(0, len(noise))
        ids = noise[:cut] + run + noise[cut:]
        assert found(ids, rule) == expected(ids, rule), (rule, ids)
        hits += found(ids, rule) is not None
    assert 1000 < hits < 2900


@given(ids=st.lists(st.integers(0, 1), max_size=40), repeats=st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_same_as_the_quadratic_reference_on_any_sequence(ids: list[int], repeats: int) -> None:
    rule = RepetitionRule(repeats=repeats, max_period=4)
    assert found(ids, rule) == expected(ids, rule)


@pytest.mark.parametrize("period", range(1, 15))
@pytest.mark.parametrize("before", [0, 3, 40])
@pytest.mark.parametrize("after", [0, 5])
def test_32_repeats_of_13_tokens_are_too_many_and_31_or_14_are_not(
    period: int, before: int, after: int
) -> None:
    gram = list(range(100, 100 + period))
    head, tail = list(range(before)), list(range(50, 50 + after))
    # 31 whole rows and all of a 32nd but one token, split over both ends.
    for part in range(period):
        short = gram[period - part :] + gram * 31 + gram[: period - 1 - part]
        assert find_repetition(np.array(head + short + tail)) is None
        whole = gram[period - part :] + gram * 31 + gram[: period - part]
        run = find_repetition(np.array(head + whole + tail))
        assert run == (Repetition(period, 32, before) if period <= 13 else None)


def test_long_runs_of_a_shorter_gram_count_as_its_repeats() -> None:
    run = find_repetition(np.array([7] * 64, np.uint16))
    assert run == Repetition(1, 64, 0)
    assert find_repetition(np.array([7] * 31, np.uint16)) is None
    assert find_repetition(np.array([], np.int32)) is None


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"repeats": 1}, "repeats is 1; it must be at least 2"),
        ({"min_period": 0}, r"min_period \(0\) and max_period \(13\)"),
        ({"min_period": 14}, r"min_period \(14\) and max_period \(13\)"),
    ],
)
def test_rule_that_means_nothing_is_refused(settings_: dict[str, int], message: str) -> None:
    assert (OLMOE_RULE.repeats, OLMOE_RULE.min_period, OLMOE_RULE.max_period) == (32, 1, 13)
    with pytest.raises(ConfigError, match=message):
        RepetitionRule(**settings_)
