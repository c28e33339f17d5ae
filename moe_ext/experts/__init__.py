"""Expert compute."""

from moe_ext.experts.backends import (
    AUTO,
    EXPERT_BACKENDS,
    ExpertBackend,
    ExpertFunction,
    ProjectionFunction,
    Use,
    get_expert_backend,
    get_expert_projection,
    look_up_backend,
    register_expert_backend,
)
from moe_ext.experts.choose import choose_backend
from moe_ext.experts.mlp import ExpertMLP

__all__ = [
    "AUTO",
    "EXPERT_BACKENDS",
    "ExpertBackend",
    "ExpertFunction",
    "ExpertMLP",
    "ProjectionFunction",
    "Use",
    "choose_backend",
    "get_expert_backend",
    "get_expert_projection",
    "look_up_backend",
    "register_expert_backend",
]
