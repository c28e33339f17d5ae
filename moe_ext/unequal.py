"""Computes routing in which tokens have unequal numbers of experts, as pure tensor functions.

Letters are those of `moe_ext.functional`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_ext.functional import count_tokens


class DenseRouting(NamedTuple):
    """Holds where each token goes, where tokens have unequal numbers of experts."""

    gates: Tensor
    """[t, e] weights of all experts, at least fp32; 0 where the expert is not the token's."""
    is_chosen: Tensor
    """[t, e] bool: whether the expert computes the token."""


def choose_tokens(scores: Tensor, *, topk: int) -> Tensor:
    """Lets each expert choose the tokens of each group that score highest with it.

    Of the n tokens of a group an expert takes max(1, floor(k n / e)); of equal ones the first.

    Source: Zhou et al., expert choice routing (arXiv 2202.09368), equation 1.

    Args:
        scores: [s, b, e] of b groups of s tokens each; below 0 where there is no token.
        topk: k, the mean number of experts per token.

    Returns:
        [s, b, e] bool.
    """
    length, _, num_experts = scores.shape
    number = (scores[..., 0] >= 0).sum(dim=0)  # [b]
    capacity = (number * topk // num_experts).clamp(min=1).minimum(number)
    order = scores.sort(dim=0, descending=True, stable=True).indices  # [s, b, e]
    is_taken = torch.arange(length, device=scores.device)[:, None] < capacity  # [s, b], by rank
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    return nothing.scatter_(0, order, is_taken[..., None].expand_as(order))


def within_capacity(
    experts: Tensor,
    gates: Tensor,
    *,
    num_experts: int,
    factor: float,
    by_gate: bool,
    is_token: Tensor | None = None,
) -> Tensor:
    """Says which assignments experts keep that take ceil(factor * T k / e) at most.

    Args:
        experts: [T, k] int64 of all tokens of the micro-batch, in order.
        gates: [T, k].
        num_experts: e.
        factor: capacity as a multiple of the mean load.
        by_gate: keep those of the largest gates, and of equal ones the first; else the first.
        is_token: [T] bool, False for padding, which is no assignment; None for none.

    Returns:
        [T, k] bool.
    """
    owners = experts  # [T, k], e for no assignment
    if is_token is not None:
        owners = owners.masked_fill(~is_token[:, None], num_experts)
    flat = owners.flatten()
    counts = count_tokens(flat, num_experts=num_experts + 1)  # [e + 1]
    number = (flat < num_experts).sum().double()
    capacity = (number * factor / num_experts).ceil()
    order = torch.arange(len(flat), device=flat.device)
    if by_gate:
        order = gates.detach().flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # by expert, the preferred first
    starts = counts.cumsum(dim=0) - counts
    places = torch.empty_like(order)
    places[order] = torch.arange(len(flat), device=flat.device)
    is_kept = (places - starts[flat] < capacity) & (flat < num_experts)
    return is_kept.view_as(experts)
