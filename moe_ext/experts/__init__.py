"""Computes experts: backends, the choice among them, and the layers that use them.

What a backend is, is in `interface`; `EXPERT_BACKENDS` lists them. Routing is in `moe_ext.routers`.
"""

from moe_ext.experts.backends import (
    AUTO,
    EXPERT_BACKENDS,
    look_up_backend,
    register_expert_backend,
)
from moe_ext.experts.choose import BackendChoice, choose_backend, use_of_model
from moe_ext.experts.interface import ExpertBackend, ExpertFunction, ProjectionFunction, Use
from moe_ext.experts.mlp import ExpertMLP

__all__ = [
    "AUTO",
    "EXPERT_BACKENDS",
    "BackendChoice",
    "ExpertBackend",
    "ExpertFunction",
    "ExpertMLP",
    "ProjectionFunction",
    "Use",
    "choose_backend",
    "look_up_backend",
    "register_expert_backend",
    "use_of_model",
]
