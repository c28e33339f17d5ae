"""Rows sorted by expert, and the way back to the tokens they came from.

A row is one token in one of its k slots; row j * k + i is slot i of token j.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Which row stands where when the rows are sorted by expert."""

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
        """[t * k] int64: the token of the row at each place of the sorted order."""
        return self.rows // self.topk


def sort_by_expert(experts: Tensor, *, num_experts: int) -> ExpertOrder:
    """Sort the rows by expert; those of one expert stay in the order of the tokens.

    Nothing is copied to the host.

    Args:
        experts: [t, k] int64, the expert of each token's slots.
        num_experts: e.
    """
    owners = experts.flatten()  # [t * k]
    rows = owners.argsort(stable=True)
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    counts = owners.new_zeros(num_experts).scatter_add_(0, owners, torch.ones_like(owners))
    return ExpertOrder(
        rows=rows, places=places, tokens_per_expert=counts, topk=int(experts.shape[1])
    )


def spread_tokens(tokens: Tensor, order: ExpertOrder) -> Tensor:
    """Each token once for each of its slots, sorted by expert: [t, n] to [t * k, n]."""
    spread: Tensor = _Spread.apply(tokens, order)
    return spread


def collect_tokens(rows: Tensor, order: ExpertOrder) -> Tensor:
    """The sum of each token's rows, which are sorted by expert: [t * k, n] to [t, n]."""
    collected: Tensor = _Collect.apply(rows, order)
    return collected


def sort_rows(rows: Tensor, order: ExpertOrder) -> Tensor:
    """[t * k, n] by token and slot to [t * k, n] sorted by expert."""
    ordered: Tensor = _Permute.apply(rows, order.rows, order.places)
    return ordered


def unsort_rows(rows: Tensor, order: ExpertOrder) -> Tensor:
    """[t * k, n] sorted by expert to [t * k, n] by token and slot."""
    ordered: Tensor = _Permute.apply(rows, order.places, order.rows)
    return ordered


def _repeat(tokens: Tensor, order: ExpertOrder) -> Tensor:
    return tokens.index_select(0, order.tokens)  # [t * k, n]


def sum_slots(rows: Tensor, order: ExpertOrder) -> Tensor:
    """`collect_tokens` without a gradient."""
    if rows.is_cuda or len(rows) == 0:
        by_token = rows.index_select(0, order.places)  # [t * k, n]
        return by_token.unflatten(0, (-1, order.topk)).sum(dim=1)  # [t, n]
    # On a CPU this is one pass where the two steps above take three. In fp32 the bits are the same;
    # in bf16 they are as near, but rounded elsewhere.
    return F.embedding_bag(order.places.view(-1, order.topk), rows, mode="sum")


def sort_gates(gates: Tensor, order: ExpertOrder | None) -> Tensor:
    """[t, k] to [t * k] sorted by expert, without a gradient; as it is where rows are sorted."""
    return gates if order is None else gates.flatten().index_select(0, order.rows)


def unsort_gates(rows: Tensor, like: Tensor, order: ExpertOrder | None) -> Tensor:
    """The inverse of `sort_gates`, of like's shape."""
    return rows if order is None else rows.index_select(0, order.places).view_as(like)


# The gradient of an indexed read adds in an order that CUDA does not fix. Each function here knows
# the inverse of its index, so both directions are reads, and the sums over k are ordered.


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tokens: Tensor, order: ExpertOrder
    ) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return _repeat(tokens, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _Collect.apply(grad, ctx.order), None  # type: ignore[attr-defined]


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: ExpertOrder
    ) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return sum_slots(rows, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grad, ctx.order), None  # type: ignore[attr-defined]


class _Permute(torch.autograd.Function):
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
        return _Permute.apply(grad, inverse, index), None, None
