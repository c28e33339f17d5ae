"""Compare every measure with its definition, in plain Python over lists of tokens."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moe_ext.analysis.coactivation import (
    CoActivation,
    JointCounts,
    cluster_order,
    random_coactivation,
    strongest,
)
from moe_ext.analysis.load import BalanceSums, DomainCounts, balance, load_figures, pooled_loss
from moe_ext.analysis.ordering import are_probabilities, by_gate, choices_of_outputs
from moe_ext.analysis.saturation import Saturation, random_saturation
from moe_ext.analysis.vocabulary import (
    VocabularyCounts,
    expert_means,
    mean_specialization,
    random_mean,
)
from moe_ext.functional import Routing, load_balancing_loss, softmax_topk, topk_softmax

SHAPES = [(5, 1), (5, 3), (4, 4), (1, 1), (64, 8)]
"""Experts and k: one of several, some, all, a single one."""
DOMAINS = 3
VOCAB = 7


class Tokens:
    """Random tokens as plain lists; the last expert serves none where it need not."""

    def __init__(self, num_experts: int, topk: int, *, seed: int, count: int = 157) -> None:
        rng = random.Random(seed)
        usable = range(max(topk, num_experts - 1))
        self.experts = [rng.sample(usable, topk) for _ in range(count)]
        # Domain 0 is rare and domain 2 empty; id 6 never occurs, and some tokens have no id.
        self.domains = [0 if rng.random() < 0.1 else 1 for _ in range(count)]
        self.ids = [rng.choice([-1, 0, 0, 0, 1, 2, 3, 4, 5]) for _ in range(count)]

    def portions(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(self.experts), size):
            part = slice(start, start + size)
            yield (
                np.array(self.experts[part], dtype=np.int16),
                np.array(self.domains[part], dtype=np.int16),
                np.array(self.ids[part], dtype=np.int32),
            )


def fed(make: Any, feed: Any, tokens: Tokens, *, size: int, parts: int) -> Any:
    """Feed accumulators by turns, and merge them."""
    several = [make() for _ in range(parts)]
    for number, portion in enumerate(tokens.portions(size)):
        feed(several[number % parts], portion)
    for other in several[1:]:
        several[0].merge(other)
    return several[0]


def same(found: np.ndarray, expected: Sequence[Any] | np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=0)


def over(count: int, total: int) -> float:
    return count / total if total else math.nan


def shares_of(rows: Sequence[Sequence[int]], total: int, num_experts: int) -> list[float]:
    return [over(sum(expert in row for row in rows), total) for expert in range(num_experts)]


@pytest.mark.parametrize(("num_experts", "topk"), SHAPES)
@pytest.mark.parametrize(("size", "parts"), [(1000, 1), (7, 3)])
def test_domain_shares(num_experts: int, topk: int, size: int, parts: int) -> None:
    tokens = Tokens(num_experts, topk, seed=1)
    counts = fed(
        lambda: DomainCounts(DOMAINS, num_experts),
        lambda counts, portion: counts.add(portion[0], portion[1]),
        tokens,
        size=size,
        parts=parts,
    )
    for first_only in (False, True):
        expected = []
        for domain in range(DOMAINS):
            of_domain = [
                row[:1] if first_only else row
                for row, own in zip(tokens.experts, tokens.domains, strict=True)
                if own == domain
            ]
            expected.append(
                [
                    over(sum(e in row for row in of_domain), len(of_domain))
                    for e in range(num_experts)
                ]
            )
        shares = counts.shares(first_only=first_only)
        same(shares, expected)
        assert np.nansum(shares[0]) == pytest.approx(1 if first_only else topk)
    assert np.isnan(counts.shares()[2]).all()  # a domain without tokens


@pytest.mark.parametrize(("num_experts", "topk"), SHAPES)
@pytest.mark.parametrize(("size", "parts"), [(1000, 1), (7, 3)])
def test_coactivation(num_experts: int, topk: int, size: int, parts: int) -> None:
    tokens = Tokens(num_experts, topk, seed=2)
    counts = fed(
        lambda: CoActivation(num_experts),
        lambda counts, portion: counts.add(portion[0]),
        tokens,
        size=size,
        parts=parts,
    )
    together = [[0.0] * num_experts for _ in range(num_experts)]
    adjacent = [[0.0] * num_experts for _ in range(num_experts)]
    for i, j in itertools.product(range(num_experts), repeat=2):
        with_i = [row for row in tokens.experts if i in row]
        both = sum(i != j and j in row for row in with_i)
        neighbours = sum(
            any({i, j} == set(pair) for pair in itertools.pairwise(row)) for row in with_i
        )
        together[i][j] = over(both, len(with_i))
        adjacent[i][j] = over(neighbours, len(with_i))
    same(counts.values(), together)
    same(counts.adjacent_values(), adjacent)
    # Of k experts each has k - 1 companions.
    assert counts.together.sum() == len(tokens.experts) * topk * (topk - 1)
    assert counts.adjacent.sum() == len(tokens.experts) * 2 * (topk - 1)


def test_random_levels_are_those_of_random_choices() -> None:
    rng, count = random.Random(3), 4000
    rows = np.array([rng.sample(range(12), 4) for _ in range(2 * count)])
    pairs = CoActivation(12)
    pairs.add(rows)
    off_diagonal = ~np.eye(12, dtype=bool)
    level, adjacent = random_coactivation(12, 4)
    assert pairs.values()[off_diagonal].mean() == pytest.approx(level, rel=0.01)
    assert pairs.adjacent_values()[off_diagonal].mean() == pytest.approx(adjacent, rel=0.01)
    assert (level, adjacent) == pytest.approx((3 / 11, 1.5 / 11))
    saturation = Saturation(12, 4)
    saturation.add(rows[:count], rows[count:])
    assert saturation.value() == pytest.approx(random_saturation(12, 4), rel=0.02)
    assert saturation.first_value() == pytest.approx(random_saturation(12, 1), rel=0.1)
    assert random_coactivation(1, 1) == (0.0, 0.0)


@pytest.mark.parametrize(("num_experts", "topk"), SHAPES)
def test_saturation(num_experts: int, topk: int) -> None:
    early, late = (Tokens(num_experts, topk, seed=seed) for seed in (4, 5))
    late.experts[:50] = early.experts[:50]
    late.experts[50:80] = [row[::-1] for row in early.experts[50:80]]  # same set, other order
    counts, other = Saturation(num_experts, topk), Saturation(num_experts, topk)
    for number, (a, b) in enumerate(zip(early.portions(13), late.portions(13), strict=True)):
        (counts, other)[number % 2].add(a[0], b[0])
    counts.merge(other)
    pairs = list(zip(early.experts, late.experts, strict=True))
    assert counts.value() == pytest.approx(
        sum(len(set(a) & set(b)) / topk for a, b in pairs) / len(pairs), rel=1e-12
    )
    assert counts.first_value() == pytest.approx(
        sum(a[0] == b[0] for a, b in pairs) / len(pairs), rel=1e-12
    )
    assert math.isnan(Saturation(num_experts, topk).value())


@pytest.mark.parametrize(("num_experts", "topk"), SHAPES)
@pytest.mark.parametrize(("size", "parts"), [(1000, 1), (7, 3)])
def test_vocabulary(num_experts: int, topk: int, size: int, parts: int) -> None:
    tokens = Tokens(num_experts, topk, seed=6)
    counts = fed(
        lambda: VocabularyCounts(VOCAB, num_experts),
        lambda counts, portion: counts.add(portion[2], portion[0]),
        tokens,
        size=size,
        parts=parts,
    )
    for first_only, per_routing in itertools.product((False, True), repeat=2):
        expected = []
        for token in range(VOCAB):
            rows = [
                row[:1] if first_only else row
                for row, own in zip(tokens.experts, tokens.ids, strict=True)
                if own == token
            ]
            total = sum(map(len, rows)) if per_routing else len(rows)
            expected.append(
                [over(sum(e in row for row in rows), total) for e in range(num_experts)]
            )
        same(counts.specialization(first_only=first_only, per_routing=per_routing), expected)
        least = 20
        kept = [token for token in range(VOCAB) if tokens.ids.count(token) >= least]
        assert 0 < len(kept) < 6
        best, values = counts.best(first_only=first_only, per_routing=per_routing, min_count=least)
        assert [t for t in range(VOCAB) if best[t] >= 0] == kept
        assert mean_specialization(values) == pytest.approx(
            sum(max(expected[token]) for token in kept) / len(kept), rel=1e-12
        )
        means, numbers = expert_means(best, values, num_experts=num_experts)
        highest = {token: float(max(expected[token])) for token in kept}
        for expert in range(num_experts):
            own = [t for t in kept if expected[t].index(max(expected[t])) == expert]
            assert numbers[expert] == len(own)
            value = sum(highest[t] for t in own) / len(own) if own else math.nan
            assert means[expert] == pytest.approx(value, rel=1e-12, nan_ok=True)
    assert math.isnan(mean_specialization(np.full(3, np.nan)))


def test_rare_ids_specialize_by_chance() -> None:
    assert random_mean(np.array([1, 1]), 8, 1) == 1.0  # seen once, served by one expert
    assert random_mean(np.array([1]), 8, 8) == 1.0
    many = random_mean(np.array([100_000]), 8, 2)
    assert 0.25 < many < 0.26  # the best of eight is little above k / e
    rng = np.random.default_rng(0)
    rows = rng.random((200, 30, 8)).argsort(axis=2)[..., :1]  # 200 ids, 30 tokens each
    counts = VocabularyCounts(200, 8)
    counts.add(np.repeat(np.arange(200), 30), rows.reshape(-1, 1))
    _, values = counts.best(first_only=True, per_routing=True, min_count=1)
    drawn = random_mean(counts.occurrences, 8, 1)
    assert drawn == pytest.approx(mean_specialization(values), rel=0.05)
    assert math.isnan(random_mean(np.zeros(0, dtype=np.int64), 8, 1))


@pytest.mark.parametrize(("num_experts", "topk"), SHAPES)
def test_load(num_experts: int, topk: int) -> None:
    tokens = Tokens(num_experts, topk, seed=7)
    flat = [expert for row in tokens.experts for expert in row]
    counts = [flat.count(expert) for expert in range(num_experts)]
    figures = load_figures(np.array(counts))
    shares = [count / len(flat) for count in counts if count]
    assert figures.max_load_ratio == pytest.approx(max(counts) / (len(flat) / num_experts))
    assert figures.entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert figures.dead == counts.count(0)
    empty = load_figures(np.zeros(num_experts, dtype=np.int64))
    assert math.isnan(empty.entropy) and math.isnan(empty.max_load_ratio) and empty.dead == 0


@pytest.mark.parametrize("rule", [softmax_topk, topk_softmax])
def test_balance_is_the_loss_of_training(rule: Any) -> None:
    logits = torch.randn(96, 6, generator=torch.Generator().manual_seed(8))
    routing = rule(logits.double(), 2)
    windows, domains = [(0, 32), (32, 48), (48, 96)], [1, 1, 0]
    layers = []
    for _ in range(2):
        sums = BalanceSums(DOMAINS, 6)
        for (start, end), domain in zip(windows, domains, strict=True):
            counts = torch.bincount(routing.experts[start:end].flatten(), minlength=6)
            scores = routing.scores[start:end]
            part = BalanceSums(DOMAINS, 6)
            part.add(
                np.array([domain]),
                np.array([end - start]),
                counts.numpy()[None],
                scores.sum(dim=0).numpy()[None],
                torch.special.entr(scores).sum().numpy()[None],
            )
            sums.merge(part)
        layers.append(sums)

    def loss(*spans: tuple[int, int]) -> float:
        rows = torch.cat([torch.arange(*span) for span in spans])
        counts = torch.bincount(routing.experts[rows].flatten(), minlength=6)
        value = load_balancing_loss(routing.scores[rows], counts, num_tokens=len(rows), topk=2)
        return float(value)

    same(sums.loss(), [loss((48, 96)), loss((0, 48)), math.nan])
    by_window = (32 * loss((0, 32)) + 16 * loss((32, 48))) / 48
    same(sums.mean_window_loss(), [loss((48, 96)), by_window, math.nan])
    entropies = torch.special.entr(routing.scores).sum(dim=1)
    same(
        sums.mean_entropy(),
        [float(entropies[48:].mean()), float(entropies[:48].mean()), math.nan],
    )
    same(pooled_loss(layers), sums.loss())  # equal layers pooled are one of them
    uneven = balance(np.array([[4, 0]]), np.array([[1.5, 0.5]]), np.array([2]))
    assert uneven == pytest.approx(2 * (1.0 * 0.75))


def test_joint_counts_of_two_routers() -> None:
    rows, columns = Tokens(5, 2, seed=9), Tokens(8, 3, seed=10)
    counts, other = JointCounts(5, 8), JointCounts(5, 8)
    for number, (a, b) in enumerate(zip(rows.portions(11), columns.portions(11), strict=True)):
        (counts, other)[number % 2].add(a[0], b[0])
    counts.merge(other)
    pairs = list(zip(rows.experts, columns.experts, strict=True))
    expected = [
        [
            over(sum(i in a and j in b for a, b in pairs), sum(i in a for a, _ in pairs))
            for j in range(8)
        ]
        for i in range(5)
    ]
    same(counts.conditional(), expected)
    drawn = [(i, j) for a, b in pairs for i in a for j in b]
    information = 0.0
    for i, j in set(drawn):
        p = drawn.count((i, j)) / len(drawn)
        p_i = sum(a == i for a, _ in drawn) / len(drawn)
        p_j = sum(b == j for _, b in drawn) / len(drawn)
        information += p * math.log(p / (p_i * p_j))
    assert counts.mutual_information() == pytest.approx(information, rel=1e-9)
    copied = JointCounts(4, 4)
    copied.add(np.arange(4)[:, None], np.arange(4)[:, None])
    assert copied.mutual_information() == pytest.approx(math.log(4))
    assert math.isnan(JointCounts(2, 2).mutual_information())


def test_equal_gates_are_in_the_order_of_the_experts() -> None:
    gates = torch.tensor([[0.2, 0.5, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    experts = torch.tensor([[3, 1, 0, 2], [2, 0, 3, 1]])
    found = by_gate(Routing(experts=experts, gates=gates, scores=gates))
    assert found.experts.tolist() == [[1, 0, 3, 2], [0, 1, 2, 3]]
    same(found.gates.numpy(), torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.25] * 4]).tolist())


@pytest.mark.parametrize(("rule", "renormalizes"), [(softmax_topk, False), (topk_softmax, True)])
def test_router_outputs_are_read_as_logits_or_probabilities(rule: Any, renormalizes: bool) -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(11))
    expected = by_gate(rule(logits, 3))
    for outputs in (logits, logits.softmax(dim=-1)):
        found = choices_of_outputs(outputs, 3, renormalizes=renormalizes)
        assert torch.equal(found.experts, expected.experts)
        torch.testing.assert_close(found.gates, expected.gates)
    assert are_probabilities(logits.softmax(dim=-1).bfloat16()) and not are_probabilities(logits)
    with pytest.raises(ValueError, match="k from 1 to e"):
        choices_of_outputs(logits, 7, renormalizes=False)


def test_strongest_experts_are_those_first_met() -> None:
    values = np.array(
        [[1.0, 0.1, 0.2, 0.9], [0.1, 1.0, 0.3, 0.3], [0.0, 0.8, 1.0, 0.1], [np.nan] * 4]
    )
    assert strongest(values, 3) == [0, 3, 2]
    assert strongest(values, 9) == [0, 3, 2, 1]


def test_clusters_are_neighbours() -> None:
    rng = np.random.default_rng(12)
    groups = rng.permutation(12).reshape(3, 4)
    values = rng.random((12, 12)) * 0.1
    for group in groups:
        values[np.ix_(group, group)] += 0.5
    order = cluster_order(values)
    assert sorted(order) == list(range(12))
    found = {frozenset(order[start : start + 4]) for start in (0, 4, 8)}
    assert found == {frozenset(group.tolist()) for group in groups}
    assert cluster_order(np.zeros((1, 1))) == [0]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.array([[0, 4]]), "expert 4 is out of range; there are 4"),
        (np.array([[-1, 2]]), "expert -1 is out of range"),
        (np.array([1, 2]), r"must be \[t, k\]"),
    ],
)
def test_wrong_experts_are_refused(experts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoActivation(4).add(experts)
    with pytest.raises(ValueError, match=message):
        DomainCounts(1, 4).add(experts, np.zeros(len(experts), dtype=int))
    with pytest.raises(ValueError, match=message):
        VocabularyCounts(3, 4).add(np.zeros(len(experts), dtype=int), experts)
    with pytest.raises(ValueError, match=message):
        Saturation(4, 2).add(experts, experts)


def test_other_wrong_values_are_refused() -> None:
    rows = np.array([[0, 1]])
    with pytest.raises(ValueError, match="domain 2 is out of range"):
        DomainCounts(2, 4).add(rows, np.array([2]))
    with pytest.raises(ValueError, match="token id 3 is out of range"):
        VocabularyCounts(3, 4).add(np.array([3]), rows)
    with pytest.raises(ValueError, match="cannot be compared"):
        Saturation(4, 2).add(rows, np.array([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match="not the same tokens"):
        JointCounts(4, 4).add(rows, np.array([[0], [1]]))
