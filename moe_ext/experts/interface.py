"""Defines what an expert backend is: its functions, its limits, and what a run wants of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.experts.slots import (
    ExpertOrder,
    permute_tokens,
    sort_rows,
    unpermute_tokens,
    unsort_rows,
)
from moe_ext.kernels.fused import FusedKernels

ExpertFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], tokens_per_expert [el], probs [t])
to [t, h]; the contract is `loop_experts`'s."""

ProjectionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [t, n], weight [el, m, n], tokens_per_expert [el]) to [t, m]; the contract is
`loop_projection`'s."""

RoutedExpertFunction = Callable[[Tensor, Tensor, Tensor, ExpertOrder, Tensor], Tensor]
"""(tokens [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], order, gates [t, k]) to [t, h]; the
contract is `ExpertBackend.routed_experts`'s."""

RoutedProjectionFunction = Callable[[Tensor, Tensor, ExpertOrder], Tensor]
"""(tokens [t, n] or rows [t * k, n], weight [el, m, n], order); the contracts are those of
`ExpertBackend.project_slots` and `ExpertBackend.project_and_combine`."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """Says what a backend is wanted for."""

    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """Of rows and weights."""
    widths: tuple[int, ...]
    """Of the rows that are multiplied, on this rank; none without experts."""
    has_attention: bool = False
    """Whether moa attention uses the backend, too."""
    has_adapters: bool = False
    """Whether the experts have adapters of low rank, which are made of projections."""
    fused_kernels: FusedKernels = "auto"
    """Whether fused kernels may compute beside the backend's own."""
    recompute_activation: bool = False
    """Whether the gated activation must be computed again in backward, not kept."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU; None on a CPU, or where the GPU is not at hand."""


def supports_all(_use: Use) -> None:
    """Returns no problem, for a backend that can be used for anything."""


@dataclass(frozen=True, kw_only=True)
class ExpertBackend:
    """Computes experts in one way.

    What it has no fused form of is composed of its products over sorted rows and permutations in
    memory.
    """

    experts: ExpertFunction
    """SwiGLU experts, for the feed-forward layers."""
    projection: ProjectionFunction | None = None
    """One matrix per expert, for the moa attention; None if the backend has none."""
    fused_experts: RoutedExpertFunction | None = None
    """`routed_experts` without permuted tokens in memory."""
    fused_project_slots: RoutedProjectionFunction | None = None
    """`project_slots` without permuted tokens in memory."""
    fused_project_and_combine: RoutedProjectionFunction | None = None
    """`project_and_combine` without permuted rows in memory."""
    problem: Callable[[Use], str | None] = supports_all
    """Why it cannot be used for something and what to do instead, as the end of a sentence that
    begins with its name; None if it can."""
    keeps_activation: bool = True
    """Whether the permuted tokens [t * k, h] and the gated activation [t * k, f] are kept for the
    backward pass."""
    without_kernels: ExpertBackend | None = None
    """The same without the fused kernels of `moe_ext/kernels/`; None if it takes none."""

    def routed_experts(
        self, tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
    ) -> Tensor:
        """Sends each token to its experts and sums their outputs, weighted by the gates.

        Differentiable once, in the tokens, both weights and the gates.

        Args:
            tokens: [t, h].
            weight1: [el, 2, f, h] gate and up projections.
            weight2: [el, h, f] down projections.
            order: of the t * k rows.
            gates: [t, k] router weights, at least fp32.

        Returns:
            [t, h] of tokens' dtype.
        """
        if self.fused_experts is not None:
            return self.fused_experts(tokens, weight1, weight2, order, gates)
        rows = self.experts(
            permute_tokens(tokens, order),
            weight1,
            weight2,
            order.tokens_per_expert,
            sort_rows(gates.flatten(), order),
        )  # [t * k, h]
        return unpermute_tokens(rows, order)

    def project_slots(self, tokens: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        """Multiplies each token by the matrix of each of its experts.

        Differentiable once, in the tokens and the weight.

        Args:
            tokens: [t, n].
            weight: [el, m, n].
            order: of the t * k rows.

        Returns:
            [t * k, m] by token and slot.
        """
        if self.fused_project_slots is not None:
            return self.fused_project_slots(tokens, weight, order)
        rows = self._project(permute_tokens(tokens, order), weight, order)  # [t * k, m]
        return unsort_rows(rows, order)

    def project_and_combine(self, rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        """Multiplies each slot's row by its expert's matrix and sums the slots of each token.

        Differentiable once, in the rows and the weight.

        Args:
            rows: [t * k, n] by token and slot.
            weight: [el, m, n].
            order: of the rows.

        Returns:
            [t, m].
        """
        if self.fused_project_and_combine is not None:
            return self.fused_project_and_combine(rows, weight, order)
        return unpermute_tokens(self._project(sort_rows(rows, order), weight, order), order)

    def project_rows(self, rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        """Multiplies each slot's row by its expert's matrix.

        Args:
            rows: [t * k, n] by token and slot.
            weight: [el, m, n].
            order: of the rows.

        Returns:
            [t * k, m] by token and slot.
        """
        return unsort_rows(self._project(sort_rows(rows, order), weight, order), order)

    def _project(self, rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        if self.projection is None:
            raise ValueError(
                "this expert backend has no projection, which moa attention is made of; let"
                " choose_backend find one that has (Use.has_attention)"
            )
        return self.projection(rows, weight, order.tokens_per_expert)
