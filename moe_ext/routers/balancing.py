"""Says how a router's experts are kept in balance, and counts over a step for it.

There are three means: a loss, over one of three sets of tokens; a bias of the selection; and a
capacity. docs/routing.md defines them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.functional import (
    balance_of,
    count_by_sequence,
    count_tokens,
    load_balancing_loss,
    sequence_balancing_loss,
    updated_bias,
)
from moe_ext.model_fields import BalancingLoss, DropPolicy


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """Says how a router's experts are kept in balance."""

    loss: BalancingLoss = "aux_loss"
    """Tokens over which the loss is taken."""
    has_bias: bool = False
    """Add a bias for each expert to the scores that select."""
    bias_rate: float = 0.001
    """What the bias moves by after a step (u)."""
    capacity_factor: float | None = None
    """Capacity of an expert in training, as a multiple of the mean load; None: unlimited."""
    drop_policy: DropPolicy = "probs"
    """Which assignments are kept within the capacity."""


@dataclass(frozen=True, kw_only=True)
class Assignments:
    """Holds how many assignments of a micro-batch each expert has."""

    counts: Tensor
    """[e] over the ranks that share the micro-batch."""
    local_counts: Tensor
    """[e] of this rank."""
    by_sequence: Tensor | None
    """[b, e] over these ranks, where they were counted by sequence."""


def count_assignments(
    experts: Tensor,
    *,
    num_experts: int,
    num_sequences: int,
    is_token: Tensor | None,
    token_group: torch.distributed.ProcessGroup,
    loss: BalancingLoss,
) -> Assignments:
    """Counts as the loss needs it; a collective call.

    Args:
        experts: [t, k] int64 of this rank's tokens.
        num_experts: e.
        num_sequences: b.
        is_token: [t] bool, False for padding; None for none.
        token_group: the ranks that share the micro-batch.
        loss: over which tokens it is taken.
    """
    if loss == "seq_aux_loss":
        local = count_by_sequence(
            experts, num_experts=num_experts, num_sequences=num_sequences, is_token=is_token
        )
        both = sum_over_ranks(local, token_group)
        return Assignments(counts=both.sum(dim=0), local_counts=local.sum(dim=0), by_sequence=both)
    local = count_tokens(experts, num_experts=num_experts, is_token=is_token)
    return Assignments(
        counts=sum_over_ranks(local, token_group), local_counts=local, by_sequence=None
    )


def sum_over_ranks(counts: Tensor, token_group: torch.distributed.ProcessGroup) -> Tensor:
    """Sums counts over the ranks that share a micro-batch; a collective call."""
    if token_group.size() == 1:
        return counts
    summed = counts.clone()
    torch.distributed.all_reduce(summed, group=token_group)  # sum: the micro-batch
    return summed


class StepCounts:
    """Counts a router's assignments over the micro-batches of a step.

    Args:
        data_group: the ranks that have other micro-batches of the global batch.
    """

    def __init__(self, data_group: torch.distributed.ProcessGroup) -> None:
        self.data_group = data_group
        self.local: Tensor | None = None
        """[e] over the micro-batches of this rank and of those that share them."""
        self.everywhere: dict[int | None, Tensor] = {}
        """[e] over those of all ranks, as far as they were counted, by layer."""

    def reset(self) -> None:
        """Starts a step."""
        self.local = None
        self.everywhere = {}

    def add(self, counts: Tensor) -> None:
        """Takes in a micro-batch's counts [e] over the ranks that share it."""
        self.local = counts.clone() if self.local is None else self.local + counts

    def add_everywhere(self, counts: Tensor, layer: int | None) -> Tensor:
        """Takes in a micro-batch of each data parallel rank; a collective call.

        Layers that share a router are counted apart: which of them comes first depends on whether
        they are recomputed.

        Args:
            counts: [e] over the ranks that share the micro-batch.
            layer: number of the layer.

        Returns:
            [e] over all of the step so far.
        """
        summed = counts.clone()
        if self.data_group.size() > 1:
            torch.distributed.all_reduce(summed, group=self.data_group)
        if layer in self.everywhere:
            summed += self.everywhere[layer]
        self.everywhere[layer] = summed
        return summed


def balancing_loss(
    loss: BalancingLoss,
    assignments: Assignments,
    scores: Tensor,
    *,
    num_tokens: int | Tensor,
    topk: int,
    step: StepCounts,
    layer: int | None,
) -> Tensor:
    """Computes this rank's addend of the load-balancing loss; a collective call.

    Args:
        loss: over which tokens it is taken.
        assignments: of the micro-batch, counted.
        scores: [t, e] of this rank's tokens; 0 for padding.
        num_tokens: T of the micro-batch.
        topk: k.
        step: counts of the step so far; `global_aux_loss` adds the micro-batch to it.
        layer: number of the layer.
    """
    if assignments.by_sequence is not None:
        return sequence_balancing_loss(scores, assignments.by_sequence, topk=topk)
    if loss != "global_aux_loss":
        return load_balancing_loss(scores, assignments.counts, num_tokens=num_tokens, topk=topk)
    so_far = step.add_everywhere(assignments.counts, layer)  # [e]
    shares = so_far.to(scores.dtype) / so_far.sum().clamp(min=1)  # f_i of the step so far
    return balance_of(scores, shares, num_tokens=num_tokens)


def move_biases(routers: Sequence[tuple[StepCounts, Tensor, float]]) -> None:
    """Moves the biases of experts by the loads of a step; a collective call.

    Args:
        routers: of one rank, all of the same data parallel ranks: the counts of each, its bias
            [e], which is changed in place, and the rate.
    """
    if not routers:
        return
    loads = torch.cat(
        [
            torch.zeros_like(bias, dtype=torch.int64) if step.local is None else step.local
            for step, bias, _ in routers
        ]
    )
    data_group = routers[0][0].data_group
    if data_group.size() > 1:
        torch.distributed.all_reduce(loads, group=data_group)
    parts = loads.split([len(bias) for _, bias, _ in routers])
    with torch.no_grad():
        for (_, bias, rate), part in zip(routers, parts, strict=True):
            bias.copy_(updated_bias(bias, part, rate=rate))
