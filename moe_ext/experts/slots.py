"""Permutes tokens to rows sorted by expert, and back.

A row is one token in one of its k slots; row j * k + i is slot i of token j.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.functional import count_tokens
from moe_ext.kernels.expert_order import count_and_sort
from moe_ext.kernels.router_choice import MOST_EXPERTS

Mode = Literal["place", "row", "token"]
"""How an operand is arranged: its rows sorted by expert, by token and slot, or one row a token."""


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Says which row stands where when the rows are sorted by expert."""

    rows: Tensor
    """[t * k] int64: the row at each place of the sorted order."""
    places: Tensor
    """[t * k] int64: the place of each row, the inverse of `rows`."""
    tokens_per_expert: Tensor
    """[e] int64."""
    topk: int
    """Rows per token (k)."""

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Returns the token of the row at each place of the sorted order, [t * k] int64."""
        return self.rows // self.topk


def sort_by_expert(experts: Tensor, *, num_experts: int, in_kernels: bool = False) -> ExpertOrder:
    """Sorts the rows by expert; those of one expert stay in the order of the tokens.

    Nothing is copied to the host.

    Args:
        experts: [t, k] int64, the expert of each token's slots.
        num_experts: e.
        in_kernels: whether the order is counted in fused kernels, if they hold so many experts;
            the result is the same.
    """
    if in_kernels and num_experts <= MOST_EXPERTS:
        rows, places, counts = count_and_sort(experts.flatten(), num_experts)
        topk = int(experts.shape[1])
        return ExpertOrder(rows=rows, places=places, tokens_per_expert=counts, topk=topk)
    rows = experts.flatten().argsort(stable=True)  # [t * k]
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    return ExpertOrder(
        rows=rows,
        places=places,
        tokens_per_expert=count_tokens(experts, num_experts=num_experts),
        topk=int(experts.shape[1]),
    )


def permute_tokens(tokens: Tensor, order: ExpertOrder) -> Tensor:
    """Repeats each token for each of its slots, sorted by expert: [t, n] to [t * k, n]."""
    permuted: Tensor = _PermuteTokens.apply(tokens, order)
    return permuted


def unpermute_tokens(rows: Tensor, order: ExpertOrder) -> Tensor:
    """Sums each token's rows, which are sorted by expert: [t * k, n] to [t, n]."""
    tokens: Tensor = _UnpermuteTokens.apply(rows, order)
    return tokens


def sort_rows(rows: Tensor, order: ExpertOrder) -> Tensor:
    """Sorts rows [t * k, n] by token and slot into the order of their experts."""
    ordered: Tensor = _IndexRows.apply(rows, order.rows, order.places)
    return ordered


def unsort_rows(rows: Tensor, order: ExpertOrder) -> Tensor:
    """Puts rows [t * k, n] sorted by expert back in the order of tokens and slots."""
    ordered: Tensor = _IndexRows.apply(rows, order.places, order.rows)
    return ordered


def sum_slots(rows: Tensor, order: ExpertOrder) -> Tensor:
    """Computes `unpermute_tokens` without a gradient."""
    if rows.is_cuda or len(rows) == 0:
        by_token = rows.index_select(0, order.places)  # [t * k, n]
        return by_token.unflatten(0, (-1, order.topk)).sum(dim=1)  # [t, n]
    # On a CPU this is one pass where the two steps above take three. In fp32 the bits are the same;
    # in bf16 they are as near, but rounded elsewhere.
    return F.embedding_bag(order.places.view(-1, order.topk), rows, mode="sum")


def lines_of(order: ExpertOrder, mode: Mode) -> Tensor | None:
    """Returns where an operand has the row of each place, [t * k] int64; None if it is sorted."""
    if mode == "place":
        return None
    return order.tokens if mode == "token" else order.rows


def arrange(rows: Tensor, order: ExpertOrder, mode: Mode) -> Tensor:
    """Arranges sorted rows [t * k, n] as `mode` says, without a gradient; by token they are summed.

    Returns:
        [t * k, n], or [t, n] by token.
    """
    if mode == "place":
        return rows
    return sum_slots(rows, order) if mode == "token" else rows.index_select(0, order.places)


def sort_gates(gates: Tensor, order: ExpertOrder | None) -> Tensor:
    """Sorts [t, k] gates by expert to [t * k], without a gradient; without an order as they are."""
    return gates if order is None else gates.flatten().index_select(0, order.rows)


def unsort_gates(rows: Tensor, like: Tensor, order: ExpertOrder | None) -> Tensor:
    """Inverts `sort_gates`; the result has like's shape."""
    return rows if order is None else rows.index_select(0, order.places).view_as(like)


# The gradient of an indexed read adds in an order that CUDA does not fix. Each function here knows
# the inverse of its index, so both directions are reads, and the sums over k are ordered.


class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tokens: Tensor, order: ExpertOrder
    ) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return tokens.index_select(0, order.tokens)  # [t * k, n]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _UnpermuteTokens.apply(grad, ctx.order), None  # type: ignore[attr-defined]


class _UnpermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: ExpertOrder
    ) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return sum_slots(rows, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _PermuteTokens.apply(grad, ctx.order), None  # type: ignore[attr-defined]


class _IndexRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, index: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return _IndexRows.apply(grad, inverse, index), None, None
