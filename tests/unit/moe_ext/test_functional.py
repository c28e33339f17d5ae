"""Routing maths against plain Python loops in float64."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_ext.functional import (
    Routing,
    check_on_device,
    count_tokens,
    dense_routing,
    layer_coefficients,
    load_balancing_loss,
    router_z_loss,
    routing_entropy,
    softmax_topk,
    sort_choices,
    topk_softmax,
)

RoutingRule = Callable[[Tensor, int], Routing]


def random_logits(t: int = 7, e: int = 6, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(t, e, generator=generator, dtype=torch.float64)


def row_softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x) for x in row]
    return [x / sum(exps) for x in exps]


def top_indices(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:k]


def test_softmax_topk_keeps_the_probabilities_of_the_k_largest_as_they_are() -> None:
    logits = random_logits()
    experts, gates, scores = softmax_topk(logits, 3)
    for t, row in enumerate(logits.tolist()):
        full = row_softmax(row)
        chosen = top_indices(row, 3)
        assert scores[t].tolist() == pytest.approx(full, rel=1e-12)
        assert experts[t].tolist() == chosen
        assert gates[t].tolist() == pytest.approx([full[i] for i in chosen], rel=1e-12)


def test_topk_softmax_normalises_over_the_selection_alone() -> None:
    logits = random_logits()
    experts, gates, scores = topk_softmax(logits, 2)
    for t, row in enumerate(logits.tolist()):
        chosen = top_indices(row, 2)
        assert experts[t].tolist() == chosen
        assert gates[t].tolist() == pytest.approx(row_softmax([row[i] for i in chosen]), rel=1e-12)
        assert scores[t].tolist() == pytest.approx(row_softmax(row), rel=1e-12)


@pytest.mark.parametrize("rule", [softmax_topk, topk_softmax])
def test_routing_gradients_equal_finite_differences(rule: RoutingRule) -> None:
    logits = random_logits(t=3, e=4).requires_grad_()

    def gates_and_scores(x: Tensor) -> tuple[Tensor, Tensor]:
        _, gates, scores = sort_choices(rule(x, 2))
        return gates, scores

    assert torch.autograd.gradcheck(gates_and_scores, logits)


def test_choices_are_sorted_by_expert_with_their_gates() -> None:
    unsorted = softmax_topk(random_logits(), 3)
    routing = sort_choices(unsorted)
    for t in range(7):
        pairs = zip(unsorted.experts[t].tolist(), unsorted.gates[t].tolist(), strict=True)
        found = zip(routing.experts[t].tolist(), routing.gates[t].tolist(), strict=True)
        assert list(found) == sorted(pairs)
    assert routing.scores is unsorted.scores


def test_an_expert_selected_twice_is_refused() -> None:
    routing = softmax_topk(random_logits(), 3)
    routing.experts[4, 2] = routing.experts[4, 0]
    with pytest.raises(ValueError, match="selected an expert twice for one token; its `select`"):
        sort_choices(routing)


def test_dense_routing_is_the_lists_written_out_with_the_gates_gradient() -> None:
    experts, gates, _ = sort_choices(softmax_topk(random_logits().requires_grad_(), 3))
    probs, routing_map = dense_routing(experts, gates, num_experts=6)
    expected = torch.zeros(7, 6, dtype=torch.float64)
    for t in range(7):
        for expert, gate in zip(experts[t].tolist(), gates[t].tolist(), strict=True):
            expected[t, expert] = gate
    assert torch.equal(probs, expected)
    assert torch.equal(routing_map, expected > 0)
    upstream = torch.linspace(1, 2, 42, dtype=torch.float64).view(7, 6)
    (found,) = torch.autograd.grad(probs, gates, upstream)
    assert found.tolist() == [[upstream[t, e] for e in experts[t].tolist()] for t in range(7)]


def test_tokens_are_counted_expert_by_expert() -> None:
    experts = softmax_topk(random_logits(), 2).experts
    owners = experts.flatten().tolist()
    found = count_tokens(experts, num_experts=6)
    assert found.tolist() == [owners.count(e) for e in range(6)]


def test_a_condition_that_does_not_hold_is_refused_with_its_message() -> None:
    check_on_device(torch.tensor(True), "never said")
    with pytest.raises(ValueError, match="give other numbers"):
        check_on_device(torch.tensor(False), "give other numbers")


@pytest.mark.parametrize("rule", [softmax_topk, topk_softmax])
def test_bf16_logits_give_fp32_probabilities(rule: RoutingRule) -> None:
    logits = random_logits().bfloat16()
    found = rule(logits, 2)
    assert found.gates.dtype == found.scores.dtype == torch.float32
    for tensor, expected in zip(found, rule(logits.float(), 2), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("k", [0, 7])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    message = f"experts per token ({k}) must be between 1 and the number of experts (6)"
    with pytest.raises(ValueError, match=re.escape(message)):
        softmax_topk(random_logits(), k)


def loop_balance(logits: Tensor, k: int) -> Tensor:
    """e * sum_i f_i P_i, one token and one expert at a time, differentiable."""
    t, e = logits.shape
    total = torch.zeros((), dtype=torch.float64)
    for i in range(e):
        count = sum(i in top_indices(row, k) for row in logits.tolist())
        mean = sum(logits[j].exp()[i] / logits[j].exp().sum() for j in range(t)) / t
        total = total + count / (t * k) * mean
    return e * total


def test_load_balancing_loss_and_gradient_equal_the_loop() -> None:
    logits = random_logits().requires_grad_()
    experts, _, scores = softmax_topk(logits, 2)
    counts = experts.flatten().bincount(minlength=6)
    loss = load_balancing_loss(scores, counts, num_tokens=7, topk=2)
    expected = loop_balance(logits, 2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)


def test_addends_of_two_ranks_make_the_loss_of_the_whole() -> None:
    experts, _, scores = softmax_topk(random_logits(t=10), 2)
    counts = experts.flatten().bincount(minlength=6)
    whole = load_balancing_loss(scores, counts, num_tokens=10, topk=2)
    parts = [load_balancing_loss(s, counts, num_tokens=10, topk=2) for s in scores.split([4, 6])]
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_balanced_router_has_load_balancing_loss_one_and_a_collapsed_one_e_over_k() -> None:
    uniform = torch.full((12, 6), 1 / 6, dtype=torch.float64)
    balanced = load_balancing_loss(uniform, torch.full((6,), 4), num_tokens=12, topk=2)
    assert balanced.item() == pytest.approx(1.0, rel=1e-12)
    sure = torch.tensor([[0.5, 0.5, 0, 0, 0, 0]], dtype=torch.float64).expand(12, 6)
    counts = torch.tensor([12, 12, 0, 0, 0, 0])
    collapsed = load_balancing_loss(sure, counts, num_tokens=12, topk=2)
    assert collapsed.item() == pytest.approx(3.0, rel=1e-12)


def test_z_loss_and_gradient_equal_the_loop() -> None:
    logits = random_logits().requires_grad_()
    loss = router_z_loss(logits, num_tokens=7)
    expected = sum(row.exp().sum().log() ** 2 for row in logits) / 7
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)


def test_z_loss_stays_finite_where_exp_overflows() -> None:
    logits = torch.full((2, 4), 1000.0, dtype=torch.bfloat16)
    loss = router_z_loss(logits, num_tokens=2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1000 + math.log(4)) ** 2, rel=1e-6)


def test_entropy_is_zero_when_sure_and_ln_e_when_uniform() -> None:
    scores = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    expected = [0.0, math.log(4), math.log(2)]
    assert routing_entropy(scores).tolist() == pytest.approx(expected, rel=1e-6)


def test_olmoe_coefficients_are_shared_over_layers_and_the_z_loss_over_k_too() -> None:
    alpha, beta = layer_coefficients("olmoe", 0.01, 0.001, num_layers=16, topk=8)
    assert (alpha, beta) == pytest.approx((6.25e-4, 7.8125e-6), rel=1e-12)


def test_per_layer_coefficients_are_left_alone() -> None:
    assert layer_coefficients("per_layer", 0.01, 0.001, num_layers=24, topk=2) == (0.01, 0.001)


def test_an_unknown_convention_is_refused_with_the_known_ones() -> None:
    message = "unknown loss convention 'olmo'; known: olmoe, per_layer"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_coefficients("olmo", 0.01, 0.001, num_layers=1, topk=1)
