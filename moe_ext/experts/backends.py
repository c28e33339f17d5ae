"""Expert backends by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_ext import registry
from moe_ext.experts.grouped import grouped_experts, grouped_projection
from moe_ext.experts.loop import loop_experts, loop_projection

ExpertFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], tokens_per_expert [el], probs [t])
to [t, h]; the contract is `loop_experts`'s."""

ProjectionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [t, n], weight [el, m, n], tokens_per_expert [el]) to [t, m]; the contract is
`loop_projection`'s."""


@dataclass(frozen=True)
class ExpertBackend:
    """One way to compute experts."""

    experts: ExpertFunction
    """SwiGLU experts, for the feed-forward layers."""
    projection: ProjectionFunction | None = None
    """One matrix per expert, for the moa attention; None if the backend has none."""


EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "grouped": ExpertBackend(grouped_experts, grouped_projection),
    "loop": ExpertBackend(loop_experts, loop_projection),
}
"""What `MoEModelConfig.expert_backend` can name."""


def get_expert_backend(name: str) -> ExpertFunction:
    """The SwiGLU experts of the backend called `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
    """
    return registry.look_up(EXPERT_BACKENDS, name, kind="expert backend").experts


def get_expert_projection(name: str) -> ProjectionFunction:
    """The projection of the backend called `name`.

    Raises:
        ValueError: no such backend, or it has no projection.
    """
    projection = registry.look_up(EXPERT_BACKENDS, name, kind="expert backend").projection
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
    if not callable(backend):
        raise ValueError(f"expert backend '{name}' is {backend!r}; give a function")
    if projection is not None and not callable(projection):
        raise ValueError(
            f"the projection of expert backend '{name}' is {projection!r}; give a function or None"
        )
    registry.add(EXPERT_BACKENDS, name, ExpertBackend(backend, projection), kind="expert backend")
