"""Finds the routers of a model by kind and layer."""

from torch import nn

from moe_ext.attention.moa import MoASelfAttention
from moe_ext.metrics import MOA, MOE
from moe_ext.routers import MoERouter

RouterId = tuple[str, int]
"""Kind of a router, MOE or MOA, and its layer, counted from 0 as in the papers."""


def find_routers(model: nn.Module) -> dict[RouterId, MoERouter]:
    """Finds the routers of this rank's part of a model."""
    of_attention = {
        id(module.router) for module in model.modules() if isinstance(module, MoASelfAttention)
    }
    routers: dict[RouterId, MoERouter] = {}
    for module in model.modules():
        if isinstance(module, MoERouter):
            assert module.layer_number is not None  # set when the layer was built
            kind = MOA if id(module) in of_attention else MOE
            routers[kind, module.layer_number - 1] = module
    return dict(sorted(routers.items()))
