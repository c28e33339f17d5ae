"""Permutes tokens to rows sorted by expert and back, where tokens have unequal numbers of experts.

A row is a pair of a token and one of its experts. `slots` is for k experts of every token, which
needs no number on the host.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.unequal import DenseRouting


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Holds n pairs, sorted by expert; those of one expert are in the order of the tokens."""

    tokens: Tensor
    """[n] int64: the token of each row."""
    gates: Tensor
    """[n] weights of the rows, of the routing's dtype."""
    tokens_per_expert: Tensor
    """[e] int64."""
    by_token: Tensor
    """[n] int64: the rows in the order of the tokens, a token's in the order of its experts."""
    starts: Tensor
    """[t] int64: where in `by_token` each token's rows begin."""


def pair_up(routing: DenseRouting) -> Pairs:
    """Lists the pairs of a routing; copies their number to the host.

    Differentiable in the gates.
    """
    by_expert = routing.is_chosen.T  # [e, t]
    tokens = by_expert.nonzero()[:, 1]  # [n]
    sizes = routing.is_chosen.sum(dim=1)  # [t]
    return Pairs(
        tokens=tokens,
        gates=routing.gates.T.masked_select(by_expert),
        tokens_per_expert=routing.is_chosen.sum(dim=0),
        by_token=tokens.argsort(stable=True),
        starts=sizes.cumsum(dim=0) - sizes,
    )


def rows_of(tokens: Tensor, pairs: Pairs) -> Tensor:
    """Repeats each token for each of its experts, sorted by expert: [t, h] to [n, h]."""
    rows: Tensor = _RowsOf.apply(tokens, pairs)
    return rows


def sum_rows(rows: Tensor, pairs: Pairs) -> Tensor:
    """Sums each token's rows, which are sorted by expert: [n, h] to [t, h]; 0 without any."""
    tokens: Tensor = _SumRows.apply(rows, pairs)
    return tokens


def _sum(rows: Tensor, pairs: Pairs) -> Tensor:
    if len(rows) == 0:
        return rows.new_zeros(len(pairs.starts), rows.shape[1])
    return F.embedding_bag(pairs.by_token, rows, pairs.starts, mode="sum")


# As in `slots`, the gradient of an indexed read would add in an order that CUDA does not fix; here
# each direction is the other's gradient, and a token's rows are added in the order of its experts.


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tokens: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs  # type: ignore[attr-defined]
        return tokens.index_select(0, pairs.tokens)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _SumRows.apply(grad, ctx.pairs), None  # type: ignore[attr-defined]


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs  # type: ignore[attr-defined]
        return _sum(rows, pairs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _RowsOf.apply(grad, ctx.pairs), None  # type: ignore[attr-defined]
