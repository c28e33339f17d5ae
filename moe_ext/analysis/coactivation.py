"""Counts which experts are chosen together, within a layer and across routers."""

import numpy as np

from moe_ext.analysis.arrays import CHUNK, Counts, Floats, Ids, check_experts, count_pairs, ratio


class CoActivation:
    """Counts, for one layer, how often two experts serve the same token.

    Args:
        num_experts: e.
    """

    def __init__(self, num_experts: int) -> None:
        self.tokens = 0
        """Tokens that were counted."""
        self.chosen: Counts = np.zeros(num_experts, dtype=np.int64)
        """[e] tokens that chose each expert."""
        self.together: Counts = np.zeros((num_experts, num_experts), dtype=np.int64)
        """[e, e] tokens that chose both; symmetric, 0 on the diagonal."""
        self.adjacent: Counts = np.zeros((num_experts, num_experts), dtype=np.int64)
        """[e, e] tokens that ranked the two next to each other; symmetric."""

    def add(self, experts: Ids) -> None:
        """Counts tokens' experts [t, k], in the order of their gates.

        Raises:
            ValueError: an expert is out of range.
        """
        size = len(self.chosen)
        check_experts(experts, num_experts=size)
        self.tokens += len(experts)
        self.chosen += np.bincount(experts.ravel(), minlength=size)
        topk = experts.shape[1]
        firsts, seconds = np.triu_indices(topk, 1)
        for start in range(0, len(experts), CHUNK):
            part = experts[start : start + CHUNK]
            pairs = count_pairs(
                part[:, firsts].ravel(), part[:, seconds].ravel(), shape=(size, size)
            )
            self.together += pairs + pairs.T
            pairs = count_pairs(part[:, :-1].ravel(), part[:, 1:].ravel(), shape=(size, size))
            self.adjacent += pairs + pairs.T

    def merge(self, other: "CoActivation") -> None:
        """Adds what another accumulator of the same layer counted."""
        self.tokens += other.tokens
        self.chosen += other.chosen
        self.together += other.together
        self.adjacent += other.adjacent

    def values(self) -> Floats:
        """Computes N(i and j) / N(i), [e, e], NaN in the rows of experts without a token.

        Source: OLMoE (arXiv 2409.02060) equation 6. On the diagonal it is 0, not 1, as in the
        paper's figure.
        """
        return ratio(self.together, self.chosen[:, None])

    def adjacent_values(self) -> Floats:
        """Computes what OLMoE's released script does: only pairs of neighbouring ranks count."""
        return ratio(self.adjacent, self.chosen[:, None])


def random_coactivation(num_experts: int, topk: int) -> tuple[float, float]:
    """Returns what a random router gives for `values` and for `adjacent_values`."""
    if num_experts == 1:
        return 0.0, 0.0
    others = num_experts - 1
    return (topk - 1) / others, 2 * (topk - 1) / topk / others


class JointCounts:
    """Counts which experts of two routers serve the same token.

    Args:
        num_rows: experts of the first router.
        num_columns: experts of the second.
    """

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.tokens = 0
        """Tokens that were counted."""
        self.rows: Counts = np.zeros(num_rows, dtype=np.int64)
        """[r] tokens that chose each of the first router's experts."""
        self.together: Counts = np.zeros((num_rows, num_columns), dtype=np.int64)
        """[rows, columns] tokens that chose both."""

    def add(self, first: Ids, second: Ids) -> None:
        """Counts the experts [t, k] and [t, k'] of the same tokens.

        Raises:
            ValueError: an expert is out of range, or the numbers of tokens differ.
        """
        num_rows, num_columns = self.together.shape
        check_experts(first, num_experts=num_rows)
        check_experts(second, num_experts=num_columns)
        if len(first) != len(second):
            raise ValueError(f"{len(first)} and {len(second)} tokens are not the same tokens")
        self.tokens += len(first)
        self.rows += np.bincount(first.ravel(), minlength=num_rows)
        for one in first.T:
            for other in second.T:
                self.together += count_pairs(one, other, shape=self.together.shape)

    def merge(self, other: "JointCounts") -> None:
        """Adds what another accumulator of the same routers counted."""
        self.tokens += other.tokens
        self.rows += other.rows
        self.together += other.together

    def conditional(self) -> Floats:
        """Computes the share [rows, columns] of an expert's tokens that chose another router's."""
        return ratio(self.together, self.rows[:, None])

    def mutual_information(self) -> float:
        """Computes how much one choice says about the other, in nats; 0 if nothing, NaN if empty.

        It is that of a random pair of a token's experts, one of each router.
        """
        total = self.together.sum()
        if total == 0:
            return float("nan")
        joint = self.together / total
        expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        there = joint > 0
        return float((joint[there] * np.log(joint[there] / expected[there])).sum())


def strongest(values: Floats, count: int) -> list[int]:
    """Returns up to `count` experts as they are first met among pairs of falling value.

    Both experts of a pair are taken, the row's first; equal pairs are in the order of their
    numbers. So OLMoE's figure 21 chooses.
    """
    size = len(values)
    flat = np.where(np.isnan(values), -1.0, values)
    np.fill_diagonal(flat, -1.0)
    found: dict[int, None] = {}
    for at in np.argsort(-flat, axis=None, kind="stable"):
        if len(found) >= min(count, size):
            break
        for expert in divmod(int(at), size):
            if len(found) < count:
                found.setdefault(expert)
    return list(found)


def cluster_order(values: Floats) -> list[int]:
    """Orders experts so that those often chosen together are neighbours.

    Average linkage: the two groups with the highest mean of both directions are joined until one is
    left; at the seam the closer ends meet. NaN counts as 0.
    """
    filled = np.nan_to_num(values)
    near = (filled + filled.T) / 2
    np.fill_diagonal(near, -np.inf)
    groups = [[expert] for expert in range(len(near))]
    between, sizes = near.copy(), np.ones(len(near))
    alive = np.ones(len(near), dtype=np.bool_)
    for _ in range(len(near) - 1):
        one, other = divmod(int(np.argmax(between)), len(near))
        groups[one] = _joined(groups[one], groups[other], near)
        weights = sizes[[one, other]] / sizes[[one, other]].sum()
        mean = weights[0] * between[one] + weights[1] * between[other]
        between[one], between[:, one] = mean, mean
        between[other], between[:, other] = -np.inf, -np.inf
        between[one, one] = -np.inf
        sizes[one] += sizes[other]
        alive[other] = False
    return groups[int(np.flatnonzero(alive)[0])] if len(near) else []


def _joined(one: list[int], other: list[int], near: Floats) -> list[int]:
    """Joins two ordered groups with their closest ends at the seam."""
    ways = [(a, b) for a in (one, one[::-1]) for b in (other, other[::-1])]
    best = max(ways, key=lambda way: near[way[0][-1], way[1][0]])
    return [*best[0], *best[1]]
