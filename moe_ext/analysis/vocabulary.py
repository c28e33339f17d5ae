"""Counts which experts serve each token id: vocabulary specialization."""

import math

import numpy as np

from moe_ext.analysis.arrays import Counts, Floats, Ids, check_experts, check_range, ratio

_ROWS = 1 << 12
"""Ids whose shares are held at a time."""


class VocabularyCounts:
    """Counts, for one layer, the experts of every token id.

    Args:
        vocab_size: v.
        num_experts: e.
    """

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        self.occurrences: Counts = np.zeros(vocab_size, dtype=np.int64)
        """[v] tokens of each id."""
        self.chosen: Counts = np.zeros((vocab_size, num_experts), dtype=np.int64)
        """[v, e] of these the ones that have the expert among their k."""
        self.first: Counts = np.zeros((vocab_size, num_experts), dtype=np.int64)
        """[v, e] of these the ones that give the expert their largest gate."""

    def add(self, ids: Ids, experts: Ids) -> None:
        """Counts tokens.

        Args:
            ids: [t] what stands at the token, is predicted there or follows; below 0 is left out.
            experts: [t, k] of the token.

        Raises:
            ValueError: an id or an expert is out of range.
        """
        vocab_size, num_experts = self.chosen.shape
        check_experts(experts, num_experts=num_experts)
        known = ids >= 0
        if not known.all():
            ids, experts = ids[known], experts[known]
        check_range(ids, vocab_size, what="token id")
        self.occurrences += np.bincount(ids, minlength=vocab_size)
        flat = ids.astype(np.int64) * num_experts
        np.add.at(self.first.reshape(-1), flat + experts[:, 0], 1)
        for slot in experts.T:
            np.add.at(self.chosen.reshape(-1), flat + slot, 1)

    def merge(self, other: "VocabularyCounts") -> None:
        """Adds what another accumulator of the same layer counted."""
        self.occurrences += other.occurrences
        self.chosen += other.chosen
        self.first += other.first

    def specialization(
        self, *, first_only: bool, per_routing: bool, ids: Ids | None = None
    ) -> Floats:
        """Computes the share [v, e] of an id's tokens that an expert serves; NaN if it has none.

        Source: OLMoE (arXiv 2409.02060) equation 8, which divides by the id's routings over all
        experts: k for each token. Its figure 30 divides by tokens: k times as much. For the first
        expert alone both are the same.

        Args:
            first_only: count the expert of the largest gate only.
            per_routing: divide by routings; False divides by tokens.
            ids: [n] of these ids only, [n, e]; None takes all.
        """
        counts, occurrences = self.first if first_only else self.chosen, self.occurrences
        if ids is not None:
            counts, occurrences = counts[ids], occurrences[ids]
        totals = counts.sum(axis=1) if per_routing else occurrences
        return ratio(counts, totals[:, None])

    def frequent(self, min_count: int) -> Ids:
        """Returns the ids that occur at least `min_count` times."""
        return np.flatnonzero(self.occurrences >= max(min_count, 1))

    def best(self, *, first_only: bool, per_routing: bool, min_count: int) -> tuple[Ids, Floats]:
        """Finds the expert that serves most of an id's tokens, the lowest among equals.

        Returns:
            [v] the expert, -1 for ids below the minimum count; [v] its share, NaN for those.
        """
        experts = np.full(len(self.occurrences), -1, dtype=np.int64)
        values = np.full(len(self.occurrences), np.nan)
        frequent = self.frequent(min_count)
        for start in range(0, len(frequent), _ROWS):
            ids = frequent[start : start + _ROWS]
            shares = self.specialization(first_only=first_only, per_routing=per_routing, ids=ids)
            experts[ids] = shares.argmax(axis=1)
            values[ids] = shares.max(axis=1)
        return experts, values


def mean_specialization(values: Floats) -> float:
    """Averages over the ids that have a value, each alike; NaN if none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def expert_means(experts: Ids, values: Floats, *, num_experts: int) -> tuple[Floats, Counts]:
    """Averages over the ids whose best expert each one is.

    Returns:
        [e] means, NaN for an expert without such an id; [e] numbers of these ids.
    """
    mine = experts >= 0
    numbers = np.bincount(experts[mine], minlength=num_experts)
    sums = np.bincount(experts[mine], weights=values[mine], minlength=num_experts)
    return ratio(sums, numbers), numbers


def random_mean(occurrences: Counts, num_experts: int, topk: int, *, seed: int = 0) -> float:
    """Draws what a random router gives for the mean of the best expert's share of tokens.

    The best of many experts is above k / e by chance, and far above for rare ids; so each id is
    drawn with its own number of tokens.

    Args:
        occurrences: [n] tokens of each id, at least 1.
        num_experts: e.
        topk: k.
        seed: of the draw.

    Returns:
        The mean over ids; NaN without ids.
    """
    if occurrences.size == 0:
        return math.nan
    generator = np.random.default_rng(seed)
    sizes, numbers = np.unique(occurrences, return_counts=True)
    total = 0.0
    for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
        draws = generator.binomial(size, topk / num_experts, size=(min(number, 64), num_experts))
        if topk == 1:
            share = np.full(num_experts, 1 / num_experts)
            draws = generator.multinomial(size, share, size=min(number, 64))
        total += number * float(draws.max(axis=1).mean()) / size
    return total / float(numbers.sum())
