"""Expert backends by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext import registry
from moe_ext.experts.adapters import (
    experts_of,
    megablocks_problem,
    megablocks_projection,
    te_problem,
    te_projection,
)
from moe_ext.experts.grouped import (
    grouped_experts,
    grouped_problem,
    grouped_projection,
    grouped_routed,
)
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.slots import (
    ExpertOrder,
    collect_tokens,
    sort_rows,
    spread_tokens,
    unsort_rows,
)
from moe_ext.experts.triton_experts import (
    triton_collect,
    triton_experts,
    triton_problem,
    triton_projection,
    triton_routed,
    triton_spread,
)

ExpertFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], tokens_per_expert [el], probs [t])
to [t, h]; the contract is `loop_experts`'s."""

ProjectionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [t, n], weight [el, m, n], tokens_per_expert [el]) to [t, m]; the contract is
`loop_projection`'s."""

RoutedExpertFunction = Callable[[Tensor, Tensor, Tensor, ExpertOrder, Tensor], Tensor]
"""(tokens [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], order, gates [t, k]) to [t, h]; the
contract is `ExpertBackend.routed`'s."""

RoutedProjectionFunction = Callable[[Tensor, Tensor, ExpertOrder], Tensor]
"""(tokens [t, n] or rows [t * k, n], weight [el, m, n], order); the contracts are those of
`ExpertBackend.spread` and `ExpertBackend.collect`."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a backend is wanted for."""

    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """Of rows and weights."""
    widths: tuple[int, ...]
    """Of the rows that are multiplied, on this rank."""


AUTO = "auto"
"""What `MoEModelConfig.expert_backend` says to leave the choice to `choose_backend`."""


def no_problem(_use: Use) -> None:
    """Of a backend that can be used for anything."""


@dataclass(frozen=True, kw_only=True)
class ExpertBackend:
    """One way to compute experts.

    What it has no fused form of is put together from its products of sorted rows.
    """

    experts: ExpertFunction
    """SwiGLU experts, for the feed-forward layers."""
    projection: ProjectionFunction | None = None
    """One matrix per expert, for the moa attention; None if the backend has none."""
    fused_experts: RoutedExpertFunction | None = None
    """`routed` in one."""
    fused_spread: RoutedProjectionFunction | None = None
    """`spread` in one."""
    fused_collect: RoutedProjectionFunction | None = None
    """`collect` in one."""
    problem: Callable[[Use], str | None] = no_problem
    """Why it cannot be used for something and what to do instead, as the end of a sentence that
    begins with its name; None if it can."""
    keeps_activation: bool = True
    """Whether the gated activation [rows, f] is kept for the backward pass."""

    def routed(
        self, tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
    ) -> Tensor:
        """Send each token to its experts, and add up what they make of it, weighted by the gates.

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
            spread_tokens(tokens, order),
            weight1,
            weight2,
            order.tokens_per_expert,
            sort_rows(gates.flatten(), order),
        )  # [t * k, h]
        return collect_tokens(rows, order)

    def spread(self, tokens: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        """Multiply each token by the matrix of each of its experts.

        Args:
            tokens: [t, n].
            weight: [el, m, n].
            order: of the t * k rows.

        Returns:
            [t * k, m] by token and slot.
        """
        if self.fused_spread is not None:
            return self.fused_spread(tokens, weight, order)
        rows = self._project(spread_tokens(tokens, order), weight, order)  # [t * k, m]
        return unsort_rows(rows, order)

    def collect(self, rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        """Multiply each slot's row by its expert's matrix, and add up the slots of each token.

        Args:
            rows: [t * k, n] by token and slot.
            weight: [el, m, n].
            order: of the rows.

        Returns:
            [t, m].
        """
        if self.fused_collect is not None:
            return self.fused_collect(rows, weight, order)
        return collect_tokens(self._project(sort_rows(rows, order), weight, order), order)

    def _project(self, rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
        assert self.projection is not None
        return self.projection(rows, weight, order.tokens_per_expert)


EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "grouped": ExpertBackend(
        experts=grouped_experts,
        projection=grouped_projection,
        fused_experts=grouped_routed,
        problem=grouped_problem,
        keeps_activation=False,
    ),
    "loop": ExpertBackend(experts=loop_experts, projection=loop_projection),
    "megablocks": ExpertBackend(
        experts=experts_of(megablocks_projection),
        projection=megablocks_projection,
        problem=megablocks_problem,
    ),
    "triton": ExpertBackend(
        experts=triton_experts,
        projection=triton_projection,
        fused_experts=triton_routed,
        fused_spread=triton_spread,
        fused_collect=triton_collect,
        problem=triton_problem,
        keeps_activation=False,
    ),
    "te": ExpertBackend(
        experts=experts_of(te_projection), projection=te_projection, problem=te_problem
    ),
}
"""What `MoEModelConfig.expert_backend` can name, besides "auto"."""


def look_up_backend(name: str) -> ExpertBackend:
    """The backend called `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
    """
    return registry.look_up(EXPERT_BACKENDS, name, kind="expert backend")


def get_expert_backend(name: str) -> ExpertFunction:
    """The SwiGLU experts of the backend called `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
    """
    return look_up_backend(name).experts


def get_expert_projection(name: str) -> ProjectionFunction:
    """The projection of the backend called `name`.

    Raises:
        ValueError: no such backend, or it has no projection.
    """
    projection = look_up_backend(name).projection
    if projection is None:
        able = [other for other, backend in EXPERT_BACKENDS.items() if backend.projection]
        raise ValueError(
            f"expert backend '{name}' has no projection, which moa attention is made of; give one"
            f" to register_expert_backend, or use expert_backend {' or '.join(sorted(able))}"
        )
    return projection


def register_expert_backend(
    name: str, backend: ExpertFunction, projection: ProjectionFunction | None = None
) -> None:
    """Make a backend available under `name`.

    Args:
        name: what `expert_backend` is to say.
        backend: SwiGLU experts.
        projection: one matrix per expert; without it moa attention refuses the backend.

    Raises:
        ValueError: the name is taken, or a function cannot be called.
    """
    if name == AUTO:
        raise ValueError(f"'{AUTO}' leaves the choice to the run; register the backend by a name")
    if not callable(backend):
        raise ValueError(f"expert backend '{name}' is {backend!r}; give a function")
    if projection is not None and not callable(projection):
        raise ValueError(
            f"the projection of expert backend '{name}' is {projection!r}; give a function or None"
        )
    made = ExpertBackend(experts=backend, projection=projection)
    registry.add(EXPERT_BACKENDS, name, made, kind="expert backend")
