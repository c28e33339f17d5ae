"""Expert compute."""

from moe_ext.experts.backends import (
    EXPERT_BACKENDS,
    ExpertBackend,
    get_expert_backend,
    register_expert_backend,
)
from moe_ext.experts.mlp import ExpertMLP

__all__ = [
    "EXPERT_BACKENDS",
    "ExpertBackend",
    "ExpertMLP",
    "get_expert_backend",
    "register_expert_backend",
]
