"""Computes experts on QuACK's grouped products in CuTe, as SonicMoE does (arXiv 2512.14080).

This module does not need QuACK; calling its functions does. The first product reads tokens through
the order while it loads them and applies SwiGLU in its epilogue; the gradient of SwiGLU is another
epilogue, which computes the activation again and sums the router's gradient on the way. What is
kept is what `triton` keeps, however fine the experts.

Bytes that move between memory and L2 for each of the t * k rows, in bf16, besides the weights and
their gradients:

| pass | reads | writes |
|---|---|---|
| gather, product with weight1, SwiGLU with the router's gate | 2h | 4f + 2f |
| product with weight2 | 2f | 2h |
| gather and sum of a token's rows | 2h | 2h / k |
| backward: gather, product with weight2, SwiGLU's gradient | 2h + 4f | 4f + 2f |
| weight2's gradient, gather | 2h + 2f | |
| weight1's gradient, gather | 2h + 4f | |
| product with weight1 | 4f | 2h |
| gather and sum of a token's rows | 2h | 2h / k |

That is `triton_experts`'s table: QuACK's products write by place, in whole tiles, and the sum
gathers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ext.experts.slots import ExpertOrder, Mode

if TYPE_CHECKING:
    from moe_ext.experts.cute_products import RaggedRows


def cute_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """Computes SwiGLU experts over tokens sorted by expert: W2 (silu(Wg x) * (Wu x) * prob).

    Differentiable once. An expert without tokens gets zero gradients. Nothing is copied to the
    host, so counts that do not sum to t are not noticed, and leave rows without a meaning.

    Args:
        hidden: [t, h] tokens, those of the first expert first; bf16.
        weight1: [el, 2, f, h] gate and up projections, bf16.
        weight2: [el, h, f] down projections, bf16.
        tokens_per_expert: [el] integers that sum to t, on any device.
        probs: [t] router weights.

    Returns:
        [t, h] in bf16.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _experts(hidden, weight1, weight2, probs, tokens_per_expert, order=None)


def cute_routed_experts(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Sends tokens to experts and sums; the contract is `ExpertBackend.routed_experts`'s.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _experts(tokens, weight1, weight2, gates, order.tokens_per_expert, order=order)


def cute_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix: x W^T.

    Differentiable once. An expert without rows gets a zero gradient. Counts are as in
    `cute_experts`.

    Args:
        rows: [t, n], those of the first expert first; bf16.
        weight: [el, m, n] bf16.
        tokens_per_expert: [el] integers that sum to t, on any device.

    Returns:
        [t, m] in bf16.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    return _project(rows, weight, tokens_per_expert, order=None, read="place", write="place")


def cute_project_slots(tokens: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies each token by its experts' matrices; see `ExpertBackend.project_slots`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    counts = order.tokens_per_expert
    return _project(tokens, weight, counts, order=order, read="token", write="row")


def cute_project_and_combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies rows and sums by token; see `ExpertBackend.project_and_combine`.

    Raises:
        ValueError: shapes or dtypes do not fit.
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
    _check_operands(tokens, {"weight1": weight1, "weight2": weight2})
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
    from moe_ext.experts.cute_autograd import CuteExperts

    inputs = [tokens, weight1, weight2, gates]
    is_kept = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    # What is contiguous already is not copied.
    inputs = [each.contiguous() for each in inputs]
    output: Tensor = CuteExperts.apply(
        *inputs, _ragged_rows(tokens, counts, number, order), is_kept
    )
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
    _check_operands(source, {"weight": weight})
    number = len(source) if order is None or read == "row" else len(source) * order.topk
    if weight.dim() != 3 or weight.shape[::2] != (len(counts), source.shape[1]):
        raise ValueError(
            f"weight {tuple(weight.shape)} must be [el, m, n], with el {len(counts)} of the counts"
            f" and n {source.shape[1]} of the rows"
        )
    from moe_ext.experts.cute_autograd import CuteProjection

    # What is contiguous already is not copied.
    operands = source.contiguous(), weight.contiguous()
    rows = _ragged_rows(source, counts, number, order)
    output: Tensor = CuteProjection.apply(*operands, rows, read, write)
    return output


def _ragged_rows(
    source: Tensor, counts: Tensor, number: int, order: ExpertOrder | None
) -> RaggedRows:
    from moe_ext.experts.cute_products import RaggedRows

    counts = counts.to(source.device, non_blocking=True)
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=source.device)
    torch.cumsum(counts, dim=0, dtype=torch.int32, out=starts[1:])
    if order is None:
        return RaggedRows(starts=starts, number=number, rows=None, places=None)
    if len(order.rows) != number:
        raise ValueError(
            f"the order is of {len(order.rows)} rows, but there are {number}; sort the experts of"
            " these tokens"
        )
    rows, places = order.rows.to(torch.int32), order.places.to(torch.int32)
    return RaggedRows(starts=starts, number=number, rows=rows, places=places, topk=order.topk)


def _check_operands(operand: Tensor, weights: dict[str, Tensor]) -> None:
    """Refuses operands that the products cannot take."""
    if operand.dim() != 2:
        raise ValueError(f"rows of experts are {tuple(operand.shape)}; they must be [t, n]")
    for name, weight in weights.items():
        if weight.dtype != operand.dtype:
            raise ValueError(
                f"{name} is {weight.dtype}, its rows are {operand.dtype}; give both the same dtype"
            )
