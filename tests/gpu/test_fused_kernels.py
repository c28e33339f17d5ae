"""Compares fused kernels with torch's functions at the models' sizes, in bf16 on a GPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor

from moe_ext import functional
from moe_ext.experts.gate import gated_backward, gated_forward
from moe_ext.experts.slots import sort_by_expert
from moe_ext.kernels import fused
from moe_ext.kernels.gated_unit import gated_unit
from moe_ext.kernels.rotated_norm import rotated_norm
from moe_ext.kernels.routed_unit import routed_unit, routed_unit_gradient
from moe_ext.kernels.router_choice import RouterRule, select
from moe_ext.kernels.router_losses import differentiable, router_losses
from moe_ext.layers.head import VocabularyPart, linear_cross_entropy
from moe_ext.layers.norm import weighted_unit_rms
from moe_ext.layers.products import accumulating_linear
from moe_ext.layers.rotary import RotaryAngles
from tests.gpu.test_triton_experts import random
from tests.gpu.waits import no_synchronisation

pytestmark = pytest.mark.gpu

# A product's operands are rounded to bf16 (2^-9), independently, so this is relative to a norm.
NEAR = 1e-2


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def test_the_head_gives_what_torch_gives_without_host_synchronisation() -> None:
    torch.manual_seed(0)
    tokens, width, rows, real = 4096, 2048, 50304, 50280
    hidden, weight = random(tokens, width), random(rows, width, std=width**-0.5)
    labels = torch.randint(real, (tokens,), device="cuda")
    mask = (torch.rand(tokens, device="cuda") > 0.1).float()
    group: Any = SimpleNamespace(size=lambda: 1)
    part = VocabularyPart(first=0, number=real, num_token_ids=real, group=group)
    assert fused.takes("auto", hidden)

    def run(setting: fused.FusedKernels) -> list[Tensor]:
        losses = linear_cross_entropy(
            hidden, weight, labels, mask, part=part, fused_kernels=setting
        )
        return [losses, *torch.autograd.grad(losses, [hidden, weight], mask / tokens)]

    run("auto")  # kernels are compiled, which may synchronise
    with no_synchronisation():
        losses, *gradients = run("auto")
    again = run("auto")
    assert all(torch.equal(a, b) for a, b in zip([losses, *gradients], again, strict=True))
    expected, *of_torch = run("off")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)  # of the same logits
    for a, b in zip(gradients, of_torch, strict=True):
        assert distance(a, b) < NEAR
    assert not gradients[1][real:].any()


def test_a_weight_gradient_is_added_in_fp32_without_being_rounded() -> None:
    torch.manual_seed(0)
    rows, weight = random(4096, 1024), torch.nn.Parameter(random(2048, 1024).detach())
    before = torch.randn(2048, 1024, device="cuda")
    weight.main_grad = before.clone()  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    upstream = random(4096, 2048).detach()
    accumulating_linear(rows, weight).backward(upstream)
    exact = before.double() + upstream.double().T @ rows.detach().double()
    # A gradient rounded to bf16 first would be off by 1e-3.
    assert distance(weight.main_grad, exact) < 1e-5  # type: ignore[attr-defined]


def compare(
    compute: Callable[..., Tensor], of_torch: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    upstream = torch.randn_like(compute(*inputs))  # and kernels are compiled, which may synchronise
    torch.autograd.grad(compute(*inputs), inputs, upstream)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        output = function(*inputs)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    with no_synchronisation():
        actual = run(compute)
    again, expected = run(compute), run(of_torch)
    for a, b, c in zip(actual, expected, again, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert distance(a, b) < NEAR
        assert torch.equal(a, c)


@pytest.mark.parametrize("width", [64, 2048, 4096, 8192])
def test_a_norm_gives_what_torch_gives(width: int) -> None:
    torch.manual_seed(0)
    inputs = [random(3, 1001, width), random(width)]
    compare(
        lambda x, w: weighted_unit_rms(x, w, 1e-5, fused_kernels="auto"),
        lambda x, w: weighted_unit_rms(x, w, 1e-5, fused_kernels="off"),
        inputs,
    )


def test_a_norm_of_heads_gives_what_torch_gives_without_copying_them() -> None:
    torch.manual_seed(0)
    both = random(1001, 2, 16, 3 * 128).detach()
    keys = both.split(128, dim=-1)[1].requires_grad_()
    compare(
        lambda x, w: weighted_unit_rms(x, w, 1e-5, fused_kernels="auto"),
        lambda x, w: weighted_unit_rms(x, w, 1e-5, fused_kernels="off"),
        [keys, random(2048)],
    )


def test_heads_are_normalised_and_rotated_as_by_torch() -> None:
    torch.manual_seed(0)
    both = random(1001, 2, 16, 3 * 128).detach()
    keys = both.split(128, dim=-1)[1].requires_grad_()
    angles = RotaryAngles(128, base=10000.0)(torch.arange(1001, device="cuda")[None])
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)
    config.multi_latent_attention = False

    def of_torch(heads: Tensor, weight: Tensor) -> Tensor:
        normed = weighted_unit_rms(heads, weight, 1e-5, fused_kernels="off")
        group: Any = SimpleNamespace()  # asked for nothing: the sequence is whole
        rotated: Tensor = apply_rotary_pos_emb(normed, angles, config=config, cp_group=group)
        return rotated

    compare(lambda x, w: rotated_norm(x, w, angles, 1e-5), of_torch, [keys, random(2048)])


@pytest.mark.parametrize("ffn", [1000, 5632])
def test_swiglu_gives_what_torch_gives(ffn: int) -> None:
    torch.manual_seed(0)

    def of_torch(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up

    compare(gated_unit, of_torch, [random(3, 501, 2 * ffn)])


def test_swiglu_of_routed_rows_gives_what_torch_gives() -> None:
    torch.manual_seed(0)
    inputs = [random(4001, 2 * 1024), torch.rand(4001, device="cuda").requires_grad_()]
    upstream = random(4001, 1024).detach()

    def of(forward: Callable[..., Tensor], backward: Callable[..., Any]) -> list[Tensor]:
        projected, probs = (each.detach() for each in inputs)
        return [forward(projected, probs), *backward(upstream, projected, probs)]

    of(routed_unit, routed_unit_gradient)  # is compiled
    with no_synchronisation():
        actual = of(routed_unit, routed_unit_gradient)
    again = of(routed_unit, routed_unit_gradient)
    for a, b, c in zip(actual, of(gated_forward, gated_backward), again, strict=True):
        assert a.dtype == b.dtype and distance(a, b) < NEAR and torch.equal(a, c)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("rule", "number", "topk"),
    [("softmax_topk", 64, 8), ("topk_softmax", 8, 2), ("softmax_topk", 500, 16)],
)
def test_routing_gives_what_torch_gives(
    rule: RouterRule, number: int, topk: int, is_padded: bool
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20001, number, device="cuda").requires_grad_()
    is_token = torch.rand(20001, device="cuda") > 0.1 if is_padded else None
    upstream = torch.randn(20001, topk, device="cuda")

    def in_kernels() -> list[Tensor]:
        found = select(logits.detach(), rule, topk, is_token=is_token, with_sums=True)
        assert found.sums is not None
        losses = router_losses(found.sums, topk, balance_coeff=0.5, z_coeff=0.1, batch_share=1.0)
        gates, scores, addend = differentiable(logits, found, losses, rule, is_token)
        assert addend is not None
        (gradient,) = torch.autograd.grad(
            [gates, addend], logits, [upstream, torch.ones_like(addend)]
        )
        return [found.experts, gates.detach(), scores.detach(), addend.detach(), gradient]

    def in_torch() -> list[Tensor]:
        exact = logits.detach().double().requires_grad_()
        routing = functional.sort_choices(getattr(functional, rule)(exact, topk))
        counts = functional.count_tokens(routing.experts, num_experts=number, is_token=is_token)
        scores, num_tokens = routing.scores, counts.sum() // topk
        if is_token is not None:
            scores = scores.masked_fill(~is_token[:, None], 0.0)
        balance = functional.load_balancing_loss(scores, counts, num_tokens=num_tokens, topk=topk)
        z_loss = functional.router_z_loss(exact, num_tokens=num_tokens, is_token=is_token)
        addend = 0.5 * balance + 0.1 * z_loss
        (gradient,) = torch.autograd.grad((routing.gates * upstream).sum() + addend, exact)
        return [routing.experts, routing.gates, routing.scores, addend, gradient]

    in_kernels()  # is compiled
    with no_synchronisation():
        actual = in_kernels()
    (experts, *others), expected = actual, in_torch()
    # Two scores can be equal in fp32 that are not in fp64.
    assert (experts != expected[0]).sum() <= 4
    for a, b in zip(others, expected[1:], strict=True):
        assert distance(a, b.detach()) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(actual, in_kernels(), strict=True))


@pytest.mark.parametrize(("number", "experts"), [(131072, 64), (40001, 8), (777, 1000)])
def test_the_order_of_rows_is_torchs(number: int, experts: int) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(experts, (number, 1), device="cuda")
    sort_by_expert(chosen, num_experts=experts, in_kernels=True)  # is compiled
    with no_synchronisation():
        order = sort_by_expert(chosen, num_experts=experts, in_kernels=True)
    expected = sort_by_expert(chosen, num_experts=experts)
    for name in ("rows", "places", "tokens_per_expert"):
        assert torch.equal(getattr(order, name), getattr(expected, name))
