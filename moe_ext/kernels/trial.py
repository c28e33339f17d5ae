"""Tries each fused kernel on a small problem, on the device that a run computes on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext import functional
from moe_ext.kernels.cross_entropy import softmax_gradient_, softmax_statistics
from moe_ext.kernels.expert_order import count_and_sort
from moe_ext.kernels.gated_unit import gated_unit
from moe_ext.kernels.rms_norm import rms_norm
from moe_ext.kernels.rotated_norm import rotated_norm
from moe_ext.kernels.routed_unit import routed_unit, routed_unit_gradient
from moe_ext.kernels.router_choice import RouterRule, select
from moe_ext.kernels.router_losses import differentiable, router_losses

_ERROR = 2e-2
"""Of a norm; operands and results are rounded to bf16 (2^-9) a few times."""
_EPS = 1e-5


def find_problem(device: torch.device) -> str | None:
    """Returns which kernel fails or differs from torch on this device, in bf16; None if none."""
    for name, attempt in (
        ("cross-entropy", _try_cross_entropy),
        ("RMSNorm", _try_norm),
        ("norm and rotation", _try_rotated_norm),
        ("SwiGLU", _try_gated_unit),
        ("SwiGLU of experts", _try_routed_unit),
        ("routing", _try_router),
        ("the experts' order", _try_expert_order),
    ):
        try:
            with torch.enable_grad():
                pairs = attempt(device)
        # What a compiler raises has no common class; the reason is told and torch computes.
        except Exception as error:
            return f"that of {name} fails here ({type(error).__name__}: {error})"
        for found, wanted in pairs:
            distance = float((found.float() - wanted).norm() / wanted.norm())
            if not distance <= _ERROR:  # NaN, too
                return f"that of {name} is {distance:.2g} off torch's result here"
    return None


Comparisons = list[tuple[Tensor, Tensor]]
"""What a kernel gives, and what torch does in fp32."""


def _try_cross_entropy(device: torch.device) -> Comparisons:
    # More than a block of 4,096, so that blocks are put together.
    logits, weights = _random(device, 5, 5000), _random(device, 5).float()
    labels = torch.tensor([0, 4999, 500, -1, 7], device=device)
    exact, at_once = logits.float(), logits.clone()
    largest, total, target = softmax_statistics(logits, labels, None)
    softmax_statistics(at_once, labels, weights)
    wanted = exact.softmax(dim=1)
    of_label = torch.zeros_like(exact)
    for row, label in enumerate(labels.tolist()):
        if label >= 0:
            of_label[row, label] = 1.0
    gradient = weights[:, None] * (wanted - of_label)
    softmax_gradient_(logits, labels, weights, largest, total)
    return [
        (largest + total.log(), exact.logsumexp(dim=1)),
        (target, (exact * of_label).sum(dim=1)),
        (logits, gradient),
        (at_once, gradient),
    ]


def _try_norm(device: torch.device) -> Comparisons:
    inputs = [_random(device, 7, 96), _random(device, 96)]
    return _compare(
        lambda x, w: rms_norm(x, w, _EPS),
        lambda x, w: F.rms_norm(x, (96,), eps=_EPS) * w,
        inputs,
    )


def _try_rotated_norm(device: torch.device) -> Comparisons:
    half = torch.linspace(0.0, 3.0, 3 * 16, device=device).view(3, 1, 1, 16)
    angles = torch.cat([half, half], dim=-1)

    def of_torch(heads: Tensor, weight: Tensor) -> Tensor:
        normed = F.rms_norm(heads.flatten(-2), (64,), eps=_EPS) * weight
        first, second = normed.view(heads.shape).chunk(2, dim=-1)
        return torch.cat(
            [
                first * half.cos() - second * half.sin(),
                second * half.cos() + first * half.sin(),
            ],
            dim=-1,
        )

    inputs = [_random(device, 3, 2, 2, 32), _random(device, 64)]
    return _compare(lambda x, w: rotated_norm(x, w, angles, _EPS), of_torch, inputs)


def _try_gated_unit(device: torch.device) -> Comparisons:
    def of_torch(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up

    return _compare(gated_unit, of_torch, [_random(device, 7, 2 * 96)])


def _try_routed_unit(device: torch.device) -> Comparisons:
    projected, probs, grad = _random(device, 7, 192), _random(device, 7), _random(device, 7, 96)

    def of_torch(projected: Tensor, probs: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up * probs[:, None]

    leaves = [each.float().requires_grad_() for each in (projected, probs)]
    output = of_torch(*leaves)
    gradients = torch.autograd.grad(output, leaves, grad.float())
    *found, again = routed_unit_gradient(grad, projected, probs.float())
    wanted = output.detach()
    return [
        (routed_unit(projected, probs.float()), wanted),
        (again, wanted),
        *zip(found, gradients, strict=True),
    ]


def _try_router(device: torch.device) -> Comparisons:
    rules: tuple[RouterRule, ...] = ("softmax_topk", "topk_softmax")
    return [pair for rule in rules for pair in _try_rule(device, rule)]


def _try_rule(device: torch.device, rule: RouterRule) -> Comparisons:
    tokens, number, topk = 40, 12, 3
    # In each row, numbers that differ in bf16.
    cells = torch.arange(tokens)[:, None] * 5 + torch.arange(number) * 7
    logits = (cells % number / 4).to(device, torch.bfloat16).requires_grad_()
    is_token = torch.arange(tokens, device=device) % 4 > 0
    found = select(logits.detach(), rule, topk, is_token=is_token, with_sums=True)
    assert found.sums is not None
    losses = router_losses(found.sums, topk, balance_coeff=0.5, z_coeff=0.1, batch_share=1.0)
    gates, _, addend = differentiable(logits, found, losses, rule, is_token)
    assert addend is not None
    exact = logits.detach().float().requires_grad_()
    truth = functional.sort_choices(getattr(functional, rule)(exact, topk))
    scores = truth.scores.masked_fill(~is_token[:, None], 0.0)
    counts = functional.count_tokens(truth.experts, num_experts=number, is_token=is_token)
    num_tokens = is_token.sum()
    balance = functional.load_balancing_loss(scores, counts, num_tokens=num_tokens, topk=topk)
    z_loss = functional.router_z_loss(exact, num_tokens=num_tokens, is_token=is_token)
    upstream = torch.linspace(-1, 1, gates.numel(), device=device).view_as(gates)
    gradients = [
        torch.autograd.grad((chosen * upstream).sum() + loss, leaf)[0]
        for chosen, loss, leaf in (
            (gates, addend, logits),
            (truth.gates, 0.5 * balance + 0.1 * z_loss, exact),
        )
    ]
    return [
        _unlike(found.experts, truth.experts),
        (gates.detach(), truth.gates.detach()),
        (losses.record[5:], counts.float()),
        (gradients[0], gradients[1]),
    ]


def _try_expert_order(device: torch.device) -> Comparisons:
    experts = torch.arange(300) ** 2 % 13  # of 16, 7 of them used
    order = experts.argsort(stable=True)
    rows, places, counts = count_and_sort(experts.to(device), 16)
    wanted = (order, order.argsort(), experts.bincount(minlength=16))
    return [_unlike(a, b.to(device)) for a, b in zip((rows, places, counts), wanted, strict=True)]


def _unlike(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Compares integers: one that differs is more than `_ERROR` of 2,000."""
    differs = (found != wanted).float()
    return 1.0 + differs, torch.ones_like(differs)


def _compare(
    kernel: Callable[..., Tensor], of_torch: Callable[..., Tensor], inputs: list[Tensor]
) -> Comparisons:
    """Returns output and gradients of both."""
    found = _with_gradients(kernel, inputs)
    return list(zip(found, _with_gradients(of_torch, [x.float() for x in inputs]), strict=True))


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = function(*leaves)
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    gradients = torch.autograd.grad(output, leaves, upstream.to(torch.bfloat16).to(output.dtype))
    return [output.detach(), *gradients]


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16)
