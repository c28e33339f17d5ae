"""Tests the comparison of runs with numbers worked out by hand."""

import math

import pytest

from moe_app.ablate.sign_tables import (
    Pair,
    compare,
    equal_losses,
    first_reach,
    pairs_of,
    student_cdf,
)
from moe_app.ablate.studies_file import Study
from moe_app.ablate.sweep_tables import Point, Trained

STUDY = Study(
    name="balancing",
    title="Load-balancing loss",
    source="",
    runs={"base": "with", "without": "without"},
    better="base",
    metric="valid",
    published={"valid": {"base": 3.712, "without": 3.788}, "HellaSwag": {"base": 0.5}},
)


def trained(run: str, seed: int, valid: float, **more: float) -> Trained:
    return Trained(
        run=run,
        seed=seed,
        tokens=1000,
        flops=5000,
        seconds=20,
        final={"valid": valid, **{key.replace("_", " "): value for key, value in more.items()}},
    )


@pytest.mark.parametrize(
    ("t", "freedom", "probability"),
    [
        # Quantiles of printed tables.
        (6.313752, 1, 0.95),
        (2.919986, 2, 0.95),
        (2.353363, 3, 0.95),
        (4.604095, 4, 0.995),
        (1.475884, 5, 0.9),
        (2.228139, 10, 0.975),
        (2.042272, 30, 0.975),
        (0.0, 7, 0.5),
        # For one and two degrees there are closed forms.
        (-1.7, 1, 0.5 + math.atan(-1.7) / math.pi),
        (0.8, 2, 0.5 + 0.8 / (2 * math.sqrt(2 + 0.64))),
    ],
)
def test_the_distribution_of_t(t: float, freedom: int, probability: float) -> None:
    assert student_cdf(t, freedom) == pytest.approx(probability, abs=1e-6)


def test_runs_are_compared_under_the_same_seeds() -> None:
    runs = [
        *(trained("base", seed, loss) for seed, loss in ((1, 3.0), (2, 4.0), (3, 5.0), (4, 9.0))),
        *(trained("without", seed, loss) for seed, loss in ((3, 5.3), (1, 3.1), (2, 4.2))),
    ]

    (pair,) = compare(STUDY, runs)

    assert pair.differences == pytest.approx((0.1, 0.2, 0.3))
    assert pair.mean == pytest.approx(0.2)
    assert pair.error == pytest.approx(0.1 / math.sqrt(3))
    # t = 2 sqrt(3), and with two degrees of freedom P = 1/2 + t / (2 sqrt(2 + t^2)).
    assert pair.confidence == pytest.approx(0.5 + 2 * math.sqrt(3) / (2 * math.sqrt(14)))
    assert pair.published == pytest.approx(0.076)
    assert pair.decides
    assert pair.verdict == "agrees"
    # Variances 1 and 1.21, 3.1 4.2 5.3 being 1.1 apart.
    assert pair.spread == pytest.approx(math.sqrt((1 + 1.21) / 2))


def test_an_accuracy_is_better_when_it_is_higher() -> None:
    runs = [
        trained("base", 1, 3.0, task_HellaSwag=0.4),
        trained("without", 1, 3.1, task_HellaSwag=0.3),
    ]

    loss, accuracy = compare(STUDY, runs)

    assert (loss.metric, accuracy.metric) == ("valid", "task HellaSwag")
    assert accuracy.differences == pytest.approx((0.1,))
    assert accuracy.published is None  # of one run alone
    assert not accuracy.decides


def pair_of(*differences: float, expects: bool = True, spread: float | None = 0.05) -> Pair:
    return Pair(
        study="s",
        first="a",
        other="b",
        metric="valid",
        decides=True,
        published=None,
        differences=differences,
        spread=spread,
        left_out=(),
        expects=expects,
    )


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (pair_of(0.10, 0.11, 0.12), "agrees"),
        (pair_of(-0.10, -0.11, -0.12), "disagrees"),
        (pair_of(0.10, -0.11, 0.12), "undecided"),
        (pair_of(0.1, spread=None), "undecided"),
        (pair_of(0.1, 0.1), "agrees"),
        (pair_of(0.0, 0.0), "undecided"),
        (pair_of(0.01, -0.02, 0.02, expects=False), "agrees"),
        (pair_of(0.10, 0.11, 0.12, expects=False), "disagrees"),
        (pair_of(0.30, -0.31, 0.32, expects=False), "undecided"),
    ],
)
def test_verdicts(pair: Pair, verdict: str) -> None:
    assert pair.verdict == verdict


def test_a_study_compares_the_better_run_with_each_other() -> None:
    runs = {"a": "A", "b": "B", "c": "C"}
    better = Study(name="s", title="s", source="", runs=runs, better="b")
    neither = Study(name="s", title="s", source="", runs=runs, better="none")

    assert pairs_of(better) == [("b", "a"), ("b", "c")]
    assert pairs_of(neither) == [("a", "b"), ("a", "c")]


def test_the_way_to_an_equal_loss() -> None:
    curve = [
        Point(tokens=100, seconds=4, value=5.0),
        Point(tokens=300, seconds=8, value=4.0),
        Point(tokens=500, seconds=20, value=3.0),
    ]
    base = Trained(run="base", seed=1, tokens=500, flops=1000, seconds=20, curves={"valid": curve})
    slow = Trained(run="without", seed=1, tokens=500, flops=3000, seconds=18, final={"valid": 4.5})

    (one,) = equal_losses(STUDY, [base, slow])

    # Half the way from 100 to 300 tokens, and from 4 to 6 seconds; 2 FLOPs a token.
    assert one.tokens == pytest.approx(200)
    assert one.tokens_ratio == pytest.approx(500 / 200)
    assert one.flops_ratio == pytest.approx(3000 / 400)
    assert one.seconds_ratio == pytest.approx(18 / 6)
    assert first_reach(curve, 2.9) is None
    assert first_reach(curve, 5.5) == curve[0]
