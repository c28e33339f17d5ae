"""Lists the expert backends by name."""

import dataclasses
import functools

from moe_ext import registry
from moe_ext.experts.adapters import (
    experts_of,
    megablocks_problem,
    megablocks_projection,
    te_problem,
    te_projection,
)
from moe_ext.experts.cute_experts import (
    cute_experts,
    cute_project_and_combine,
    cute_project_slots,
    cute_projection,
    cute_routed_experts,
)
from moe_ext.experts.cute_use import cute_problem
from moe_ext.experts.grouped import (
    grouped_experts,
    grouped_problem,
    grouped_project_and_combine,
    grouped_project_slots,
    grouped_projection,
    grouped_routed_experts,
)
from moe_ext.experts.interface import ExpertBackend, ExpertFunction, ProjectionFunction
from moe_ext.experts.loop import loop_experts, loop_projection
from moe_ext.experts.triton_experts import (
    triton_experts,
    triton_problem,
    triton_project_and_combine,
    triton_project_slots,
    triton_projection,
    triton_routed_experts,
)

AUTO = "auto"
"""What `MoEModelConfig.expert_backend` says to leave the choice to `choose_backend`."""

_GROUPED = ExpertBackend(
    experts=grouped_experts,
    projection=grouped_projection,
    fused_experts=grouped_routed_experts,
    fused_project_slots=grouped_project_slots,
    fused_project_and_combine=grouped_project_and_combine,
    problem=grouped_problem,
    keeps_activation=False,
)

EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "grouped": dataclasses.replace(
        _GROUPED,
        without_kernels=dataclasses.replace(
            _GROUPED,
            experts=functools.partial(grouped_experts, fused_kernels="off"),
            fused_experts=functools.partial(grouped_routed_experts, fused_kernels="off"),
        ),
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
        fused_experts=triton_routed_experts,
        fused_project_slots=triton_project_slots,
        fused_project_and_combine=triton_project_and_combine,
        problem=triton_problem,
        keeps_activation=False,
    ),
    "cute": ExpertBackend(
        experts=cute_experts,
        projection=cute_projection,
        fused_experts=cute_routed_experts,
        fused_project_slots=cute_project_slots,
        fused_project_and_combine=cute_project_and_combine,
        problem=cute_problem,
        keeps_activation=False,
    ),
    "te": ExpertBackend(
        experts=experts_of(te_projection), projection=te_projection, problem=te_problem
    ),
}
"""What `MoEModelConfig.expert_backend` can name, besides "auto"."""


def look_up_backend(name: str) -> ExpertBackend:
    """Looks up the backend called `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
    """
    return registry.look_up(EXPERT_BACKENDS, name, kind="expert backend")


def register_expert_backend(
    name: str, backend: ExpertFunction, projection: ProjectionFunction | None = None
) -> None:
    """Makes a backend available under `name`.

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
