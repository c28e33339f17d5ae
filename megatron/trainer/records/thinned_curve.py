"""Keeps a curve of any length in bounded memory."""

import math
from collections.abc import Sequence

Point = tuple[float, float]


class ThinnedCurve:
    """Keeps at most `limit` points, which draw the same curve as all that were added.

    Up to `limit` points are kept as they are. Of longer curves every stretch of 2^n points keeps
    its lowest, its highest and one that is not finite; n grows with the curve. The ends are kept.

    Args:
        limit: points to keep, beside the two ends; at least 6.
    """

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._stretches: list[list[Point]] = []
        self._kept = 0
        self._size = 1
        """Points that a full stretch stands for."""
        self._filled = 0
        """Points that the last stretch stands for."""
        self._first: Point | None = None
        self._last: Point | None = None

    def add(self, x: float, y: float) -> None:
        """Append a point; `y` may be infinite or NaN, which draws a gap."""
        self._last = point = (x, y)
        if self._first is None:
            self._first = point
        if not self._stretches or self._filled == self._size:
            self._stretches.append([])
            self._filled = 0
        self._kept -= len(self._stretches[-1])
        self._stretches[-1] = _extremes([*self._stretches[-1], point])
        self._kept += len(self._stretches[-1])
        self._filled += 1
        while self._kept > self._limit:
            self._merge()

    @property
    def points(self) -> list[Point]:
        """Return the points that were kept, in the order in which they were added."""
        points = [point for stretch in self._stretches for point in stretch]
        if self._first is not None and self._first is not points[0]:
            points.insert(0, self._first)
        if self._last is not None and self._last is not points[-1]:
            points.append(self._last)
        return points

    def at(self, y: float) -> "ThinnedCurve":
        """Make a level curve over the same places."""
        level = ThinnedCurve(self._limit)
        for x, _ in self.points:
            level.add(x, y)
        return level

    def _merge(self) -> None:
        """Make stretches twice as long."""
        pairs = [self._stretches[index : index + 2] for index in range(0, len(self._stretches), 2)]
        if len(pairs[-1]) == 2:
            self._filled += self._size
        self._stretches = [_extremes([point for part in pair for point in part]) for pair in pairs]
        self._size *= 2
        self._kept = sum(map(len, self._stretches))


def _extremes(points: Sequence[Point]) -> list[Point]:
    """Select the lowest point, the highest and the first that is not finite, in their order."""
    finite = [index for index, (_, y) in enumerate(points) if math.isfinite(y)]
    kept = set()
    if finite:
        kept = {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
    if len(finite) < len(points):
        kept.add(next(index for index, (_, y) in enumerate(points) if not math.isfinite(y)))
    return [points[index] for index in sorted(kept)]
