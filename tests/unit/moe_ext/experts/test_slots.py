"""Rows sorted by expert and brought back, against loops over tokens and slots."""

import pytest
import torch
from torch import Tensor

from moe_ext.experts.slots import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    sort_rows,
    unpermute_tokens,
    unsort_rows,
)

TOKENS, EXPERTS, WIDTH = 9, 6, 3


def random_experts(k: int) -> Tensor:
    """[t, k] distinct experts per token; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(k)
    return torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(k, dim=1).indices


@pytest.fixture(params=[1, 2, 3])
def order(request: pytest.FixtureRequest) -> ExpertOrder:
    return sort_by_expert(random_experts(request.param), num_experts=EXPERTS)


def random_rows(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_are_sorted_by_expert_and_then_by_token(k: int) -> None:
    experts = random_experts(k)
    found = sort_by_expert(experts, num_experts=EXPERTS)
    owners = experts.flatten().tolist()
    assert found.rows.tolist() == sorted(range(TOKENS * k), key=lambda row: (owners[row], row))
    assert found.places[found.rows].tolist() == list(range(TOKENS * k))
    assert found.tokens_per_expert.tolist() == [owners.count(e) for e in range(EXPERTS)]
    assert found.topk == k


def test_permuting_repeats_each_token_in_its_slots(order: ExpertOrder) -> None:
    tokens = random_rows(TOKENS)
    expected = torch.stack([tokens[row // order.topk] for row in order.rows.tolist()])
    assert torch.equal(permute_tokens(tokens, order), expected)


def test_unpermuting_sums_the_slots_of_each_token(order: ExpertOrder) -> None:
    rows = random_rows(TOKENS * order.topk)
    expected = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for place, row in enumerate(order.rows.tolist()):
        expected[row // order.topk] += rows[place]
    torch.testing.assert_close(unpermute_tokens(rows, order), expected, rtol=1e-14, atol=1e-14)


def test_unsorting_undoes_sorting(order: ExpertOrder) -> None:
    rows = random_rows(TOKENS * order.topk)
    ordered = sort_rows(rows, order)
    assert [row.tolist() for row in ordered] == [rows[i].tolist() for i in order.rows.tolist()]
    assert torch.equal(unsort_rows(ordered, order), rows)


@pytest.mark.parametrize("move", [permute_tokens, unpermute_tokens, sort_rows, unsort_rows])
def test_gradients_equal_finite_differences(move: object, order: ExpertOrder) -> None:
    assert callable(move)
    rows = random_rows(TOKENS if move is permute_tokens else TOKENS * order.topk)
    assert torch.autograd.gradcheck(lambda x: move(x, order), (rows,))
    assert torch.autograd.gradgradcheck(lambda x: move(x, order), (rows,))
