"""Compares runs pair by pair under the same seeds, and says whether a published sign is seen."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_app.ablate.studies_file import NONE, RATIOS, TASK, TRAIN, VALID, Study
from moe_app.ablate.sweep_tables import Point, Trained

LEAST_CONFIDENCE = 0.9
"""Below it a sign is undecided."""

SignVerdict = Literal["agrees", "disagrees", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Compares two runs of a study by a metric.

    Differences are advantages of the first: how much lower its loss, or higher its accuracy, is.
    """

    study: str
    """Name of the study."""
    first: str
    """The run that was published to be better; in a study of no difference, the first one."""
    other: str
    """The run beside it."""
    metric: str
    """What is compared."""
    decides: bool
    """Whether this is the metric of the study."""
    published: float | None
    """Published advantage of the first; None if there is no number."""
    differences: tuple[float, ...]
    """Advantage of the first here, by seed."""
    spread: float | None
    """Standard deviation of a run's values over seeds, of both runs pooled; None for one seed."""
    left_out: tuple[str, ...]
    """Runs whose seed is not compared, because one of the two has no such value in the end."""
    expects: bool
    """Whether the first should be better; False where no difference was found."""

    @property
    def mean(self) -> float:
        """Return the mean difference."""
        return statistics.fmean(self.differences)

    @property
    def error(self) -> float | None:
        """Return the standard error of the mean; None for one seed."""
        count = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(count) if count > 1 else None

    @property
    def confidence(self) -> float | None:
        """Return how sure the sign of the mean is, of a paired t test; None for one seed."""
        if self.error is None:
            return None
        if self.error == 0:
            return 0.5 if self.mean == 0 else 1.0
        return student_cdf(abs(self.mean) / self.error, len(self.differences) - 1)

    @property
    def verdict(self) -> SignVerdict:
        """Return whether the seeds show what was published."""
        if self.confidence is None or self.spread is None:
            return "undecided"
        is_sure = self.confidence >= LEAST_CONFIDENCE
        if not self.expects:
            if abs(self.mean) <= self.spread:
                return "agrees"
            return "disagrees" if is_sure else "undecided"
        if not is_sure:
            return "undecided"
        return "agrees" if self.mean > 0 else "disagrees"


@dataclass(frozen=True, kw_only=True)
class EqualLoss:
    """Says how much sooner a run has the other's final loss; None where it never has."""

    study: str
    """Name of the study."""
    first: str
    """The run that gets there."""
    other: str
    """The run whose final loss it is."""
    seed: int
    """Of both."""
    metric: str
    """The loss."""
    loss: float
    """That loss."""
    tokens: float | None
    """That the first needs."""
    tokens_ratio: float | None
    """Tokens of the other by those."""
    flops_ratio: float | None
    """The same of FLOPs."""
    seconds_ratio: float | None
    """The same of seconds of training."""


def student_cdf(t: float, freedom: int) -> float:
    """Return P(T <= t) of Student's distribution with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cosine, 0.0
        for number in range(1, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (number + 1) / (number + 2)
        within = 2 / math.pi * (theta + sine * total)
    else:
        term, total = 1.0, 0.0
        for number in range(0, freedom, 2):
            total += term
            term *= cosine * cosine * (number + 1) / (number + 2)
        within = sine * total
    return (1 + within) / 2


def compare(study: Study, runs: Sequence[Trained]) -> list[Pair]:
    """Compare the runs of a study by every metric that both have, the deciding one first."""
    of_run = {name: {each.seed: each for each in runs if each.run == name} for name in study.runs}
    return [
        pair
        for first, other in pairs_of(study)
        for metric in _metrics(study, (*of_run[first].values(), *of_run[other].values()))
        if (pair := _compare(study, metric, of_run[first], of_run[other])) is not None
    ]


def pairs_of(study: Study) -> list[tuple[str, str]]:
    """Return the runs that are compared: the better one with each other one."""
    first = next(iter(study.runs)) if study.better == NONE else study.better
    return [(first, other) for other in study.runs if other != first]


def _metrics(study: Study, runs: Sequence[Trained]) -> list[str]:
    known = dict.fromkeys(metric for run in runs for metric in run.final)
    published = [name for name in map(metric_name, study.published) if name not in RATIOS]
    return [name for name in dict.fromkeys((study.metric, *published, *known)) if name in known]


def metric_name(published: str) -> str:
    """Return the metric that a name in `published` means: a task may be named alone."""
    if published in (TRAIN, VALID, *RATIOS) or published.startswith((f"{VALID} ", f"{TASK} ")):
        return published
    return f"{TASK} {published}"


def _compare(
    study: Study, metric: str, first: dict[int, Trained], other: dict[int, Trained]
) -> Pair | None:
    """Compare two runs under the seeds that both have; None without any."""
    seeds = sorted(
        seed
        for seed in first.keys() & other.keys()
        if metric in first[seed].final and metric in other[seed].final
    )
    if not seeds:
        return None
    sign = 1 if metric.startswith(f"{TASK} ") else -1
    ours = [first[seed].final[metric] for seed in seeds]
    theirs = [other[seed].final[metric] for seed in seeds]
    names = (first[seeds[0]].run, other[seeds[0]].run)
    published = next(
        (values for key, values in study.published.items() if metric_name(key) == metric), {}
    )
    spread = None
    if len(seeds) > 1:
        spread = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 2)
    return Pair(
        study=study.name,
        first=names[0],
        other=names[1],
        metric=metric,
        decides=metric == study.metric,
        published=(
            sign * (published[names[0]] - published[names[1]])
            if all(name in published for name in names)
            else None
        ),
        differences=tuple(sign * (a - b) for a, b in zip(ours, theirs, strict=True)),
        spread=spread,
        left_out=tuple(
            f"{run.run} seed {seed}"
            for seed in sorted(first.keys() | other.keys())
            for run in (first.get(seed), other.get(seed))
            if run is not None and (metric in run.diverged or run.has_failed)
        ),
        expects=study.better != NONE,
    )


def equal_losses(study: Study, runs: Sequence[Trained]) -> list[EqualLoss]:
    """Say for each pair and seed how much sooner the first has the other's final loss."""
    metric = VALID if study.metric.startswith(f"{TASK} ") else study.metric
    by_key = {(each.run, each.seed): each for each in runs}
    found = []
    for first, other in pairs_of(study):
        for seed in sorted({each.seed for each in runs}):
            quick, slow = by_key.get((first, seed)), by_key.get((other, seed))
            if quick is None or slow is None or metric not in slow.final:
                continue
            loss = slow.final[metric]
            at = first_reach(quick.curves.get(metric, ()), loss)
            found.append(
                EqualLoss(
                    study=study.name,
                    first=first,
                    other=other,
                    seed=seed,
                    metric=metric,
                    loss=loss,
                    tokens=None if at is None else at.tokens,
                    tokens_ratio=None if at is None else _ratio(slow.tokens, at.tokens),
                    flops_ratio=(
                        None if at is None else _ratio(slow.flops, quick.flops_at(at.tokens))
                    ),
                    seconds_ratio=None if at is None else _ratio(slow.seconds, at.seconds),
                )
            )
    return found


def _ratio(one: float, other: float) -> float | None:
    return one / other if other > 0 else None


def first_reach(curve: Sequence[Point], loss: float) -> Point | None:
    """Return where a curve first has a loss, between two points in proportion; None if never."""
    if curve and curve[0].value <= loss:
        return curve[0]
    for before, after in itertools.pairwise(curve):
        if after.value <= loss:
            share = (before.value - loss) / (before.value - after.value)
            return Point(
                tokens=before.tokens + share * (after.tokens - before.tokens),
                seconds=before.seconds + share * (after.seconds - before.seconds),
                value=loss,
            )
    return None
