"""Computes the order in which a blend draws from its sources."""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import DataError


class Blend:
    """Assigns samples to sources so that every prefix of the run has the blend's shares.

    After any n draws each source has been drawn less than one time more or less often than its
    weight times n. Always serving the largest deficit does not give that bound (with many sources
    one can fall behind by more than 1). Earliest deadline first does: a source may be drawn again
    once its share is above its count, and must be drawn before its share is one above its count; of
    those that may, the one that must soonest is drawn, the first of equals. Source: Baruah, Cohen,
    Plaxton and Varvel, "Proportionate progress", Algorithmica 15 (1996), for one processor.

    Args:
        weights: One positive number a source; only their ratios matter.

    Raises:
        DataError: There is no weight, or one is not a positive finite number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.size == 0 or not (np.isfinite(values).all() and (values > 0).all()):
            raise DataError(
                f"blend weights are {list(weights)}; there must be at least one, each positive and"
                " finite; leave a source out instead of giving it weight 0"
            )
        values = values / values.max()  # so that the sum is finite
        self.weights = values / values.sum()  # [sources]
        # [sources]; replaced, never changed in place, so that a shallow copy is a copy.
        self.counts: npt.NDArray[np.int64] = np.zeros(values.size, dtype=np.int64)

    @property
    def num_drawn(self) -> int:
        """Return the samples drawn so far."""
        return int(self.counts.sum())

    def draw(self, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draw the next n samples.

        Returns:
            Each sample's source [n], and how many samples that source had been drawn before [n].
        """
        first = self.num_drawn
        sources, numbers = self._candidates(first, n)
        weights = self.weights[sources]
        by_deadline = np.lexsort((sources, (numbers + 1) / weights))
        if len(self.weights) > 1:
            released = _first_position(numbers, weights)[by_deadline]
            by_deadline = by_deadline[_serve(released, first, n)]
        sources, numbers = sources[by_deadline], numbers[by_deadline]
        self.counts = self.counts + np.bincount(sources, minlength=len(self.counts))
        return sources, numbers

    def _candidates(
        self, first: int, n: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return source and number of every sample that may be drawn at first to first + n - 1."""
        ends = np.ceil(self.weights * (first + n)).astype(np.int64)  # number < weight x (first + n)
        sizes = np.clip(ends - self.counts, 0, n)  # [sources]
        sources = np.repeat(np.arange(len(sizes)), sizes)  # [candidates]
        offsets = self.counts - (np.cumsum(sizes) - sizes)
        return sources, np.arange(len(sources)) + offsets[sources]


def _first_position(
    numbers: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return the first position n of the run with number < weight x (n + 1), elementwise."""
    n = np.floor(numbers / weights).astype(np.int64)
    n -= numbers < weights * n  # the quotient's rounding can be off by one position
    n += numbers >= weights * (n + 1)
    return n


def _serve(released: npt.NDArray[np.int64], first: int, n: int) -> list[int]:
    """Return which candidate each of the positions first to first + n - 1 takes.

    Args:
        released: The first position that may take each candidate; candidates are in order of
            priority, and each position takes the first that may be taken and is left.
        first: The first position.
        n: How many there are.
    """
    by_release = np.argsort(released, kind="stable")
    arrived = np.searchsorted(released[by_release], np.arange(first, first + n), side="right")
    queue = by_release.tolist()
    waiting: list[int] = []
    served = []
    begin = 0
    for end in arrived.tolist():
        for candidate in queue[begin:end]:
            heapq.heappush(waiting, candidate)
        begin = end
        served.append(heapq.heappop(waiting))
    return served
