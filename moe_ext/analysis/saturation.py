"""Compares the experts that a router chose at two times of its training."""

import numpy as np

from moe_ext.analysis.arrays import CHUNK, Ids, check_experts, selection


class Saturation:
    """Counts, for one layer, how far a checkpoint's choices are the final ones.

    Source: OLMoE (arXiv 2409.02060) equation 5.

    Args:
        num_experts: e.
        topk: k.
    """

    def __init__(self, num_experts: int, topk: int) -> None:
        self.num_experts = num_experts
        self.topk = topk
        self.tokens = 0
        """Tokens that were compared."""
        self.common = 0
        """Experts that a token has among its k both times, summed over tokens."""
        self.same_first = 0
        """Tokens whose largest gate is the same expert's both times."""

    def add(self, earlier: Ids, later: Ids) -> None:
        """Compares the experts [t, k] that the same tokens chose at two times.

        Raises:
            ValueError: shapes differ, or an expert is out of range.
        """
        check_experts(earlier, num_experts=self.num_experts)
        check_experts(later, num_experts=self.num_experts)
        if earlier.shape != later.shape or earlier.shape[1] != self.topk:
            raise ValueError(
                f"choices of {list(earlier.shape)} and {list(later.shape)} cannot be compared; both"
                f" must be [t, {self.topk}]"
            )
        self.tokens += len(earlier)
        self.same_first += int((earlier[:, 0] == later[:, 0]).sum())
        for start in range(0, len(earlier), CHUNK):
            chosen = selection(later[start : start + CHUNK], num_experts=self.num_experts)
            again = np.take_along_axis(
                chosen, earlier[start : start + CHUNK].astype(np.intp), axis=1
            )
            self.common += int(again.sum())

    def merge(self, other: "Saturation") -> None:
        """Adds what another accumulator of the same layer counted."""
        self.tokens += other.tokens
        self.common += other.common
        self.same_first += other.same_first

    def value(self) -> float:
        """Computes the mean share of the k experts that are the same; NaN without tokens."""
        return self.common / (self.tokens * self.topk) if self.tokens else float("nan")

    def first_value(self) -> float:
        """Computes the share of tokens whose first expert is the same; NaN without tokens."""
        return self.same_first / self.tokens if self.tokens else float("nan")


def random_saturation(num_experts: int, topk: int) -> float:
    """Returns what two unrelated routers give: k / e."""
    return topk / num_experts
