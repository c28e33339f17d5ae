"""Computes experts on triton kernels: no operand is permuted in memory, little is written twice.

This module does not need triton; calling its functions does.

Bytes that move between memory and L2 for each of the t * k rows, in bf16, besides the weights,
which are read once per pass, and their gradients:

| pass | reads | writes |
|---|---|---|
| gather, product with weight1, SwiGLU with the router's gate | 2h | 4f + 2f |
| product with weight2, to the row's slot | 2f | 2h |
| sum of a token's slots | 2h | 2h / k |
| backward: gather, product with weight2, SwiGLU's gradient | 2h + 4f | 4f + 2f |
| weight2's gradient, gather | 2h + 2f | |
| weight1's gradient, gather | 2h + 4f | |
| product with weight1, to the row's slot | 4f | 2h |
| sum of a token's slots | 2h | 2h / k |

That is 16h + 4h / k + 28f: each pass reads its operands once and writes its result once. The 2h of
a gather are 2h / k where L2 still has the token from another expert. Without gradients the first
pass writes 2f. Elementwise kernels of their own would add 4f forward (projected, read again) and 4f
backward (the gradient of the product, written and read); a permuted copy of the tokens, 4h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ext.experts.interface import Use
from moe_ext.experts.slots import ExpertOrder, Mode

if TYPE_CHECKING:
    from moe_ext.experts.triton_products import SortedRows

_DTYPES = (torch.bfloat16, torch.float32)


def is_available() -> tuple[bool, str]:
    """Says whether triton's kernels can be run here, and how; or why not, and the remedy."""
    # triton is imported where it is used: it takes a quarter of a second.
    from moe_ext.kernels import triton_jit

    return triton_jit.is_available()


def triton_problem(use: Use) -> str | None:
    """Says why triton's kernels cannot be used, or None."""
    if use.dtype not in _DTYPES:
        return f"multiplies bfloat16 and float32, not {use.dtype}; use 'grouped'"
    can_run, reason = is_available()
    if can_run and reason == "compiled" and use.device_type != "cuda":
        return f"computes on a GPU, not on {use.device_type}; use 'grouped'"
    return None if can_run else f"cannot be used: {reason}"


def triton_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """Computes SwiGLU experts over tokens sorted by expert: W2 (silu(Wg x) * (Wu x) * prob).

    Differentiable once. An expert without tokens gets zero gradients. Nothing is copied to the
    host, so counts that do not sum to t are not noticed, and leave rows without a meaning.

    Args:
        hidden: [t, h] tokens, those of the first expert first; bf16 or fp32.
        weight1: [el, 2, f, h] gate and up projections of the same dtype.
        weight2: [el, h, f] down projections of the same dtype.
        tokens_per_expert: [el] integers that sum to t, on any device.
        probs: [t] router weights.

    Returns:
        [t, h] of hidden's dtype.

    Raises:
        ValueError: triton cannot be used, or shapes or dtypes do not fit.
    """
    return _experts(hidden, weight1, weight2, probs, tokens_per_expert, order=None)


def triton_routed_experts(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Sends tokens to experts and sums; the contract is `ExpertBackend.routed_experts`'s.

    Raises:
        ValueError: triton cannot be used, or shapes or dtypes do not fit.
    """
    return _experts(tokens, weight1, weight2, gates, order.tokens_per_expert, order=order)


def triton_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix: x W^T.

    Differentiable once. An expert without rows gets a zero gradient. Counts are as in
    `triton_experts`.

    Args:
        rows: [t, n], those of the first expert first; bf16 or fp32.
        weight: [el, m, n] of the same dtype.
        tokens_per_expert: [el] integers that sum to t, on any device.

    Returns:
        [t, m] of rows' dtype.

    Raises:
        ValueError: triton cannot be used, or shapes or dtypes do not fit.
    """
    return _project(rows, weight, tokens_per_expert, order=None, read="place", write="place")


def triton_project_slots(tokens: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies each token by its experts' matrices; see `ExpertBackend.project_slots`.

    Raises:
        ValueError: triton cannot be used, or shapes or dtypes do not fit.
    """
    counts = order.tokens_per_expert
    return _project(tokens, weight, counts, order=order, read="token", write="row")


def triton_project_and_combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies rows and sums by token; see `ExpertBackend.project_and_combine`.

    Raises:
        ValueError: triton cannot be used, or shapes or dtypes do not fit.
    """
    counts = order.tokens_per_expert
    return _project(rows, weight, counts, order=order, read="row", write="token")


def _experts(
    tokens: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    gates: Tensor,
    counts: Tensor,
    *,
    order: ExpertOrder | None,
) -> Tensor:
    _check_use(tokens, {"weight1": weight1, "weight2": weight2})
    number = len(tokens) if order is None else len(tokens) * order.topk
    width, experts = tokens.shape[1], len(counts)
    ffn = weight2.shape[-1]
    if weight1.shape != (experts, 2, ffn, width) or weight2.shape != (experts, width, ffn):
        raise ValueError(
            f"weight1 {tuple(weight1.shape)} and weight2 {tuple(weight2.shape)} must be"
            f" [el, 2, f, h] and [el, h, f], with el {experts} of the counts and h {width} of the"
            " tokens"
        )
    if gates.numel() != number:
        raise ValueError(
            f"there are {gates.numel()} router weights for {number} rows; give as many"
        )
    from moe_ext.experts.triton_autograd import Experts

    inputs = [tokens, weight1, weight2, gates]
    is_kept = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    # Kernels compute addresses from shapes. What is contiguous already is not copied.
    inputs = [each.contiguous() for each in inputs]
    output: Tensor = Experts.apply(*inputs, _sorted_rows(tokens, counts, number, order), is_kept)
    return output


def _project(
    source: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    order: ExpertOrder | None,
    read: Mode,
    write: Mode,
) -> Tensor:
    _check_use(source, {"weight": weight})
    number = len(source) if order is None or read == "row" else len(source) * order.topk
    if weight.dim() != 3 or weight.shape[::2] != (len(counts), source.shape[1]):
        raise ValueError(
            f"weight {tuple(weight.shape)} must be [el, m, n], with el {len(counts)} of the counts"
            f" and n {source.shape[1]} of the rows"
        )
    from moe_ext.experts.triton_autograd import Projection

    # Kernels compute addresses from shapes. What is contiguous already is not copied.
    operands = source.contiguous(), weight.contiguous()
    rows = _sorted_rows(source, counts, number, order)
    output: Tensor = Projection.apply(*operands, rows, read, write)
    return output


def _sorted_rows(
    source: Tensor, counts: Tensor, number: int, order: ExpertOrder | None
) -> SortedRows:
    from moe_ext.experts.triton_products import SortedRows

    counts = counts.to(source.device, non_blocking=True).contiguous()
    if order is None:
        return SortedRows(counts=counts, number=number, index=None)
    if len(order.rows) != number:
        raise ValueError(
            f"the order is of {len(order.rows)} rows, but there are {number}; sort the experts of"
            " these tokens"
        )
    return SortedRows(counts=counts, number=number, index=order.rows.contiguous(), topk=order.topk)


def _check_use(operand: Tensor, weights: dict[str, Tensor]) -> None:
    """Refuses operands that the kernels cannot take, and machines they cannot run on."""
    can_run, reason = is_available()
    if can_run and reason == "compiled" and not operand.is_cuda:
        can_run, reason = False, f"tensors are on {operand.device}; use expert_backend 'grouped'"
    if not can_run:
        raise ValueError(f"expert backend 'triton' cannot be used: {reason}")
    if operand.dim() != 2:
        raise ValueError(f"rows of experts are {tuple(operand.shape)}; they must be [t, n]")
    if operand.dtype not in _DTYPES:
        raise ValueError(
            f"expert backend 'triton' multiplies bfloat16 and float32, not {operand.dtype}; use"
            " expert_backend 'grouped'"
        )
    for name, weight in weights.items():
        if weight.dtype != operand.dtype:
            raise ValueError(
                f"{name} is {weight.dtype}, its rows are {operand.dtype}; give both the same dtype"
            )
