"""A thinned curve has the ends, peaks and gaps of the whole one, in bounded memory."""

import itertools
import math
import random
import tracemalloc

import pytest

from megatron.trainer.records.thinned_curve import Point, ThinnedCurve

LIMIT = 50


def thinned(points: list[Point]) -> ThinnedCurve:
    curve = ThinnedCurve(LIMIT)
    for point in points:
        curve.add(*point)
    return curve


def noisy(count: int, seed: int, *, gaps: float = 0.0) -> list[Point]:
    rng = random.Random(seed)
    return [
        (float(x), math.nan if rng.random() < gaps else rng.gauss(0.0, 1.0)) for x in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, LIMIT - 1, LIMIT])
def test_short_curve_is_kept_as_it_is(count: int) -> None:
    points = noisy(count, seed=count)
    assert thinned(points).points == points


@pytest.mark.parametrize("count", [LIMIT + 1, 2 * LIMIT, 1000, 4097])
def test_long_curve_keeps_extremes_and_ends_of_what_was_added(count: int) -> None:
    points = noisy(count, seed=count)
    kept = thinned(points).points
    assert len(kept) <= LIMIT + 2
    assert kept == [point for point in points if point in set(kept)]  # in order, none invented
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    values = [y for _, y in points]
    assert min(values) in [y for _, y in kept] and max(values) in [y for _, y in kept]


def test_each_stretch_keeps_its_lowest_and_highest() -> None:
    points = noisy(64 * 16, seed=1)
    kept = set(thinned(points).points)
    # 2 points of each stretch of 32 would be more than the limit, of 64 they are 32.
    for start in range(0, len(points), 64):
        stretch = points[start : start + 64]
        assert min(stretch, key=lambda point: point[1]) in kept
        assert max(stretch, key=lambda point: point[1]) in kept


def test_gaps_stay_where_they_were() -> None:
    points = noisy(2000, seed=3)
    points[700] = (700.0, math.nan)
    points[701] = (701.0, math.inf)
    kept = thinned(points).points
    assert [x for x, y in kept if not math.isfinite(y)] == [700.0]
    assert thinned([(float(x), math.nan) for x in range(999)]).points[0][0] == 0.0


def test_straight_line_is_drawn_as_one() -> None:
    kept = thinned([(float(x), 2.0 * x) for x in range(10_000)]).points
    assert all(y == 2 * x for x, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(kept)) < 10_000 / 10


def test_level_curve_goes_over_the_same_places() -> None:
    curve = thinned(noisy(300, seed=4))
    assert curve.at(0.0).points == [(x, 0.0) for x, _ in curve.points]
    assert ThinnedCurve().at(0.0).points == []


def test_memory_does_not_grow_with_the_curve() -> None:
    curve = thinned(noisy(10_000, seed=5))
    tracemalloc.start()
    for x in range(10_000, 50_000):
        curve.add(x, math.sin(x))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e5
