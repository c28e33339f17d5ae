"""Orders the visits and summarizes timings: medians with their range, ratios of pairs."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Summarizes several measurements of one quantity."""

    median: float
    """Median; the mean of the two middle values if their number is even."""
    low: float
    """Minimum."""
    high: float
    """Maximum."""


def summarize(values: Sequence[float]) -> Summary:
    """Compute median and extremes.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("no measurements to summarize; use at least 1 round")
    return Summary(median=statistics.median(values), low=min(values), high=max(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Summary:
    """Summarize the ratios of measurements of the same round.

    Other load on the machine affects both members of a pair alike, which a ratio of two medians
    would ignore.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    if len(numerators) != len(denominators):
        raise ValueError(
            f"{len(numerators)} measurements against {len(denominators)}; pairs are of one round,"
            " so give the same number of both"
        )
    return summarize([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield round and name: every name once a round, starting with another one each time."""
    for number in range(rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            yield number, name


def synchronize(device: torch.device) -> None:
    """Wait for all work of the device; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
