"""Tries the `cute` backend on a small problem, on the device that a run computes on."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ext.experts import cute_experts
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.slots import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    sort_rows,
    unpermute_tokens,
    unsort_rows,
)

_ERROR = 2e-2
"""Of a norm; operands and results are rounded to bf16 (2^-9) a few times."""
# More rows of an expert than a tile has, and more columns; the last expert has no token.
_TOKENS, _TOPK, _EXPERTS, _WIDTH, _FFN = 200, 2, 4, 264, 136


def find_problem(device: torch.device) -> str | None:
    """Returns what fails or differs from `loop` in fp32 on this device; None if nothing does.

    The first time on a machine QuACK compiles what a run needs anyway: about two minutes.
    """
    for name, attempt in (
        ("experts over tokens", _routed),
        ("experts over sorted rows", _sorted),
        ("projections", _projections),
        ("gradients added to fp32 buffers", _added),
    ):
        try:
            with torch.enable_grad():
                pairs = attempt(device)
            distances = [_distance(found, wanted) for found, wanted in pairs]
        # What a compiler raises has no common class; the reason is told.
        except Exception as error:
            return f"fails here at {name} ({type(error).__name__}: {error})"
        for distance in distances:
            if not distance <= _ERROR:  # NaN, too
                return f"is {distance:.2g} off the result of 'loop' here at {name}"
    return None


CutePairs = list[tuple[Tensor, Tensor]]
"""What QuACK gives, and what `loop` does in fp32."""


def _routed(device: torch.device) -> CutePairs:
    order, inputs = _problem(device)

    def exact(tokens: Tensor, weight1: Tensor, weight2: Tensor, gates: Tensor) -> Tensor:
        return _loop_routed(tokens, weight1, weight2, order, gates)

    def of_cute(tokens: Tensor, weight1: Tensor, weight2: Tensor, gates: Tensor) -> Tensor:
        return cute_experts.cute_routed_experts(tokens, weight1, weight2, order, gates)

    found = _with_gradients(of_cute, inputs)
    with torch.no_grad():  # The pre-activation is not written then: another kernel.
        unkept = of_cute(*inputs)
    wanted = _with_gradients(exact, [each.float() for each in inputs])
    return [(unkept, wanted[0]), *zip(found, wanted, strict=True)]


def _sorted(device: torch.device) -> CutePairs:
    order, (tokens, weight1, weight2, gates) = _problem(device)
    counts = order.tokens_per_expert
    inputs = [permute_tokens(tokens, order), weight1, weight2, sort_rows(gates.flatten(), order)]
    return list(
        zip(
            _with_gradients(
                lambda x, w1, w2, p: cute_experts.cute_experts(x, w1, w2, counts, p), inputs
            ),
            _with_gradients(
                lambda x, w1, w2, p: loop_experts(x, w1, w2, counts, p),
                [each.float() for each in inputs],
            ),
            strict=True,
        )
    )


def _projections(device: torch.device) -> CutePairs:
    order, (tokens, weight1, weight2, _) = _problem(device)
    query, output = weight1[:, 0].contiguous(), weight2  # [el, f, h], [el, h, f]
    slots = _random(device, len(order.rows), _FFN)
    counts = order.tokens_per_expert
    found = _with_gradients(
        lambda x, w: cute_experts.cute_project_slots(x, w, order), [tokens, query]
    )
    found += _with_gradients(
        lambda x, w: cute_experts.cute_project_and_combine(x, w, order), [slots, output]
    )
    found += _with_gradients(
        lambda x, w: cute_experts.cute_projection(x, w, counts), [slots, output]
    )
    exact = [each.float() for each in (tokens, query, slots, output)]
    wanted = _with_gradients(
        lambda x, w: unsort_rows(loop_projection(permute_tokens(x, order), w, counts), order),
        exact[:2],
    )
    wanted += _with_gradients(
        lambda x, w: unpermute_tokens(loop_projection(sort_rows(x, order), w, counts), order),
        exact[2:],
    )
    wanted += _with_gradients(lambda x, w: loop_projection(x, w, counts), exact[2:])
    return list(zip(found, wanted, strict=True))


def _added(device: torch.device) -> CutePairs:
    """Adds the weights' gradients of two backward passes to what was in their buffers."""
    order, inputs = _problem(device)
    exact = [each.float() for each in inputs]
    _, _, *wanted = _with_gradients(lambda x, w1, w2, g: _loop_routed(x, w1, w2, order, g), exact)
    tokens, weight1, weight2, gates = inputs
    weights = [weight1.requires_grad_(), weight2.requires_grad_()]
    for weight in weights:
        weight.main_grad = torch.full_like(weight, 2.0, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        output = cute_experts.cute_routed_experts(tokens, weight1, weight2, order, gates)
        torch.autograd.backward(output, _upstream(output))
    return [
        (weight.main_grad - 2.0, 2 * gradient)  # type: ignore[attr-defined]
        for weight, gradient in zip(weights, wanted[:2], strict=True)
    ]


def _loop_routed(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    rows, probs = permute_tokens(tokens, order), sort_rows(gates.flatten(), order)
    output = loop_experts(rows, weight1, weight2, order.tokens_per_expert, probs)
    return unpermute_tokens(output, order)


def _problem(device: torch.device) -> tuple[ExpertOrder, list[Tensor]]:
    """Draws an order, and tokens, weights and gates."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(_TOKENS, _EXPERTS - 1, generator=generator)
    order = sort_by_expert(scores.topk(_TOPK).indices.to(device), num_experts=_EXPERTS)
    return order, [
        _random(device, _TOKENS, _WIDTH),
        _random(device, _EXPERTS, 2, _FFN, _WIDTH) * _WIDTH**-0.5,
        _random(device, _EXPERTS, _WIDTH, _FFN) * _FFN**-0.5,
        _random(device, _TOKENS, _TOPK).float().abs(),
    ]


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, _upstream(output))]


def _upstream(output: Tensor) -> Tensor:
    values = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return values.to(torch.bfloat16).to(output.dtype)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16)
