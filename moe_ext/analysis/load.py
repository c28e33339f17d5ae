"""Counts the tokens of each expert and domain: domain specialization and load."""

from dataclasses import dataclass

import numpy as np

from moe_ext.analysis.arrays import (
    Counts,
    Floats,
    Ids,
    check_experts,
    check_range,
    count_pairs,
    ratio,
)


class DomainCounts:
    """Counts, for one layer, which experts the tokens of each domain chose.

    Args:
        num_domains: number of domains.
        num_experts: e.
    """

    def __init__(self, num_domains: int, num_experts: int) -> None:
        self.tokens: Counts = np.zeros(num_domains, dtype=np.int64)
        """[domains] tokens of each domain."""
        self.chosen: Counts = np.zeros((num_domains, num_experts), dtype=np.int64)
        """[domains, e] tokens that have the expert among their k."""
        self.first: Counts = np.zeros((num_domains, num_experts), dtype=np.int64)
        """[domains, e] tokens that give the expert their largest gate."""

    def add(self, experts: Ids, domains: Ids) -> None:
        """Counts tokens.

        Args:
            experts: [t, k], see the package.
            domains: [t].

        Raises:
            ValueError: an expert or a domain is out of range.
        """
        num_domains, num_experts = self.chosen.shape
        check_experts(experts, num_experts=num_experts)
        check_range(domains, num_domains, what="domain")
        shape = (num_domains, num_experts)
        self.tokens += np.bincount(domains, minlength=num_domains)
        self.first += count_pairs(domains, experts[:, 0], shape=shape)
        for slot in experts.T:
            self.chosen += count_pairs(domains, slot, shape=shape)

    def merge(self, other: "DomainCounts") -> None:
        """Adds what another accumulator of the same layer counted."""
        self.tokens += other.tokens
        self.chosen += other.chosen
        self.first += other.first

    def shares(self, *, first_only: bool = False) -> Floats:
        """Computes the domain specialization [domains, e]: tokens of D with expert E / tokens of D.

        A domain's values add up to k, or to 1 for the first expert alone; a random router gives
        k / e. A domain without tokens is NaN. Source: OLMoE (arXiv 2409.02060) equation 7.
        """
        return ratio(self.first if first_only else self.chosen, self.tokens[:, None])


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """Describes how evenly a domain's tokens load the experts of one layer."""

    max_load_ratio: float
    """The busiest expert's assignments over the mean expert's; 1 is even."""
    entropy: float
    """Of the experts' shares of assignments, nats; ln e is even."""
    dead: int
    """Experts without a token."""


def load_figures(counts: Counts) -> LoadFigures:
    """Describes assignments [e]; without any, ratio and entropy are NaN and no expert is dead."""
    total = int(counts.sum())
    if total == 0:
        return LoadFigures(max_load_ratio=float("nan"), entropy=float("nan"), dead=0)
    shares = counts[counts > 0] / total
    return LoadFigures(
        max_load_ratio=float(counts.max() * len(counts) / total),
        entropy=float(-(shares * np.log(shares)).sum()),
        dead=int((counts == 0).sum()),
    )


def balance(counts: Counts, score_sums: Floats, tokens: Ids) -> Floats:
    """Computes load-balancing losses on MegaBlocks' scale: e * sum_i f_i P_i, 1 if balanced.

    f_i is expert i's share of the assignments, P_i the mean of its probabilities. transformers
    does not divide f_i by k: its scale is k times this one, and k if balanced. NaN without tokens.

    Args:
        counts: [..., e] tokens that chose each expert.
        score_sums: [..., e] sums of the probabilities over the same tokens.
        tokens: [...] numbers of these tokens.
    """
    assigned = counts.sum(axis=-1, keepdims=True)
    shares = ratio(counts, assigned)
    means = ratio(score_sums, np.asarray(tokens)[..., None])
    result: Floats = counts.shape[-1] * (shares * means).sum(axis=-1)
    return result


class BalanceSums:
    """Sums, for one layer, what the load-balancing loss needs: over domains and over windows.

    The loss is no mean over tokens, so it depends on what it is computed over: all text of a
    domain, or a window at a time as in training and in OLMoE's table 6.

    Args:
        num_domains: number of domains.
        num_experts: e.
    """

    def __init__(self, num_domains: int, num_experts: int) -> None:
        self.tokens: Counts = np.zeros(num_domains, dtype=np.int64)
        """[domains] tokens of each."""
        self.counts: Counts = np.zeros((num_domains, num_experts), dtype=np.int64)
        """[domains, e] assignments."""
        self.scores: Floats = np.zeros((num_domains, num_experts))
        """[domains, e] sums of probabilities."""
        self.entropy: Floats = np.zeros(num_domains)
        """[domains] sum over tokens of the entropy of their probabilities, nats."""
        self.window_loss: Floats = np.zeros(num_domains)
        """[domains] sum over windows of tokens times loss."""

    def add(
        self, domains: Ids, tokens: Ids, counts: Counts, scores: Floats, entropy: Floats
    ) -> None:
        """Takes in windows.

        Args:
            domains: [windows] domain of each window.
            tokens: [windows] its tokens.
            counts: [windows, e] its assignments.
            scores: [windows, e] its sums of probabilities.
            entropy: [windows] its sum of the tokens' entropies.

        Raises:
            ValueError: a domain is out of range.
        """
        check_range(domains, len(self.tokens), what="domain")
        np.add.at(self.tokens, domains, tokens)
        np.add.at(self.counts, domains, counts)
        np.add.at(self.scores, domains, scores)
        np.add.at(self.entropy, domains, entropy)
        np.add.at(self.window_loss, domains, tokens * balance(counts, scores, tokens))

    def merge(self, other: "BalanceSums") -> None:
        """Adds what another accumulator of the same layer summed."""
        for name in ("tokens", "counts", "scores", "entropy", "window_loss"):
            getattr(self, name)[...] += getattr(other, name)

    def loss(self) -> Floats:
        """Returns [domains] losses over all text of each domain, on MegaBlocks' scale."""
        return balance(self.counts, self.scores, self.tokens)

    def mean_window_loss(self) -> Floats:
        """Returns [domains] means of the windows' losses, weighted by tokens; MegaBlocks' scale."""
        return ratio(self.window_loss, self.tokens)

    def mean_entropy(self) -> Floats:
        """Returns [domains] mean entropies of the tokens' probabilities, nats."""
        return ratio(self.entropy, self.tokens)


def pooled_loss(layers: list[BalanceSums]) -> Floats:
    """Returns [domains] losses as transformers pools them: over the layers as if they were one."""
    counts = sum(layer.counts for layer in layers)
    scores = sum(layer.scores for layer in layers)
    tokens = sum(layer.tokens for layer in layers)
    return balance(np.asarray(counts), np.asarray(scores), np.asarray(tokens))
