"""Expert compute."""

from moe_ext.experts.backends import (
    EXPERT_BACKENDS,
    ExpertBackend,
    ExpertFunction,
    ProjectionFunction,
    get_expert_backend,
    get_expert_projection,
    register_expert_backend,
)
from moe_ext.experts.mlp import ExpertMLP

__all__ = [
    "EXPERT_BACKENDS",
    "ExpertBackend",
    "ExpertFunction",
    "ExpertMLP",
    "ProjectionFunction",
    "get_expert_backend",
    "get_expert_projection",
    "register_expert_backend",
]
