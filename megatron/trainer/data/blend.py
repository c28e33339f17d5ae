"""Which source the next sample comes from."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import DataError


class Blend:
    """Deal samples to sources so that every prefix of the run has the blend's shares.

    After any n draws each source has been drawn less than one time more or less often than its
    weight times n. Always serving the largest deficit does not give that bound (with many sources
    one can fall behind by more than 1). Earliest deadline first does: a source may be drawn again
    once its share is above its count, and must be drawn before its share is one above its count; of
    those that may, the one that must soonest is drawn. Source: Baruah, Cohen, Plaxton and Varvel,
    "Proportionate progress", Algorithmica 15 (1996), for one processor.

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
        self.counts: npt.NDArray[np.int64] = np.zeros(values.size, dtype=np.int64)  # [sources]

    @property
    def num_drawn(self) -> int:
        """Samples dealt so far."""
        return int(self.counts.sum())

    def draw(self) -> tuple[int, int]:
        """Deal the next sample.

        Returns:
            The source's index, and how many samples it had been dealt before.
        """
        may = self.counts < self.weights * (self.num_drawn + 1)
        deadline = np.where(may, (self.counts + 1) / self.weights, np.inf)
        source = int(np.argmin(deadline))
        number = int(self.counts[source])
        self.counts[source] += 1
        return source, number
