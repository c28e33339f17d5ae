"""Check the rules on single documents, and how filters are written."""

import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.trainer.errors import ConfigError
from moe_app.filter.filter_specs import FILTERS, make_spec, parse_filter
from moe_app.filter.rules import LengthRule, StarcoderRule

RULE = StarcoderRule()


def reason(text: str, **value: Any) -> str | None:
    verdict = RULE.judge(text, value)
    return verdict.reason if verdict else None


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30))
def test_shares_of_words_are_those_of_exact_fractions(words: list[str]) -> None:
    shares = sorted((Fraction(each, len(words)) for each in Counter(words).values()), reverse=True)
    wanted = None
    if shares and shares[0] > Fraction(3, 10):
        wanted = "top-word"
    elif sum(shares[:2]) > Fraction(1, 2):
        wanted = "top-two-words"
    assert reason("  \n".join(words)) == wanted


def test_words_are_what_white_space_parts_as_written() -> None:
    assert reason("x, x x; X 1 2 3 4 5 6 7 8 9") is None
    assert reason("x\tx\nx x\u3000x 1 2 3") == "top-word"
    assert reason("") is None and reason(" \n") is None


@pytest.mark.parametrize(
    ("value", "dropped"),
    [
        ({"max_stars_count": 1}, True),
        ({"max_stars_count": 2}, False),
        ({"max_stars_count": None}, True),
        ({"stars": 0}, True),
        ({"metadata": {"stars": 1}}, True),
        ({"meta": {"max_stars_count": 5}, "stars": 1}, False),
        ({"stars": "many"}, False),
        ({}, False),
    ],
)
def test_code_of_repositories_with_fewer_than_two_stars_goes(
    value: dict[str, Any], dropped: bool
) -> None:
    assert reason("a b c d e", **value) == ("stars" if dropped else None)


@pytest.mark.parametrize(
    ("unit", "length"), [("characters", 7), ("bytes", 10), ("words", 2), ("tokens", 3)]
)
def test_bounds_of_length_are_inclusive(unit: Any, length: int) -> None:
    text = "\u00e9\u00e9 \u00e9abc"
    for bounds, wanted in [
        ({"min": length}, None),
        ({"min": length + 1}, "too-short"),
        ({"max": length}, None),
        ({"max": length - 1}, "too-long"),
    ]:
        verdict = LengthRule(unit=unit, **bounds).judge(text, lambda text: 3)
        assert (verdict.reason if verdict else None) == wanted


def test_filters_are_read_as_written() -> None:
    assert list(FILTERS) == [
        *("repeated-ngram", "starcoder", "length", "exact", "minhash", "decontaminate")
    ]
    spec = parse_filter("repeated-ngram:repeats=8,max-period=4")
    assert spec.as_json() == {"repeated-ngram": {"repeats": 8, "min_period": 1, "max_period": 4}}
    assert parse_filter("starcoder:top_word=0.25").options == StarcoderRule(top_word=0.25)
    for text in ("exact", "length:min=1", "minhash:buckets=3", "decontaminate:against=a"):
        spec = parse_filter(text)
        ((name, options),) = spec.as_json().items()
        assert make_spec(name, options) == spec  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("repeated", "no filter is named 'repeated'; did you mean 'repeated-ngram'?"),
        ("length", "length: length has neither min nor max"),
        ("length:units=3", "length has no setting 'units'; did you mean 'unit'?"),
        ("length:min=three", "length: min is 'three'; it must be a whole number"),
        ("length:min=nan", "length: min is 'nan'; it must be a whole number"),
        ("length:min=5,max=4", "min (5) must be at most max (4)"),
        ("length:min=1,unit=pages", "unit is 'pages'; it must be one of characters, bytes"),
        ("length:min", "'min' sets nothing; write key=value"),
        ("length:min=1,min=2", "min is set twice"),
        ("starcoder:top_word=1.5", "top_word is 1.5; a share must be above 0 and at most 1"),
        ("exact:by=line", "by is 'line'; it must be document or paragraph"),
        ("minhash:hashes=0", "hashes is 0; it must be at least 1"),
        ("decontaminate", "decontaminate needs against"),
        ("decontaminate:against=a,ngram=5", "min_words (8) must be at least 1 and at most ngram"),
    ],
)
def test_wrong_filter_is_refused_with_the_right_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_filter(text)
