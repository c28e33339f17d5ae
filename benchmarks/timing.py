"""What is made of timings: order of the visits, medians with their spread, ratios of pairs."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Several measurements of one quantity."""

    median: float
    """The middle one, or the mean of the two in the middle."""
    low: float
    """The smallest."""
    high: float
    """The largest."""


def summarize(values: Sequence[float]) -> Summary:
    """Median and extremes.

    Raises:
        ValueError: there is nothing to summarize.
    """
    if not values:
        raise ValueError("no measurements to summarize; use at least 1 round")
    return Summary(median=statistics.median(values), low=min(values), high=max(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Ratios of what was measured in the same round, summarized.

    Other load on the machine meets both members of a pair alike, which a ratio of two medians would
    not use.

    Raises:
        ValueError: the rounds differ in number.
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"{len(numerators)} measurements against {len(denominators)}; a pair is of one round,"
            " so give as many of both"
        )
    return summarize([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Number of the round and whom to visit: all in each round, another one first each time."""
    for number in range(rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            yield number, name


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
