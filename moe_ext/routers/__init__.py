"""Selects experts for each token: one router a file, all in the table `ROUTERS`.

The maths is in `moe_ext.functional`.
"""

from moe_ext import registry
from moe_ext.functional import Routing
from moe_ext.routers.base import MoERouter
from moe_ext.routers.expert_choice import ExpertChoiceRouter, GroupedExpertChoiceRouter
from moe_ext.routers.softmax_topk import SoftmaxTopKRouter
from moe_ext.routers.topk_softmax import TopKSoftmaxRouter
from moe_ext.unequal import DenseRouting

ROUTERS: dict[str, type[MoERouter]] = {
    "expert_choice": ExpertChoiceRouter,
    "expert_choice_grouped": GroupedExpertChoiceRouter,
    "softmax_topk": SoftmaxTopKRouter,
    "topk_softmax": TopKSoftmaxRouter,
}
"""What `MoEModelConfig.router` can name."""


def get_router(name: str) -> type[MoERouter]:
    """Looks up the router class called `name`.

    Raises:
        ValueError: no such router; the message names the nearest one.
    """
    return registry.look_up(ROUTERS, name, kind="router")


def register_router(name: str, router: type[MoERouter]) -> None:
    """Makes `router` available under `name`.

    Raises:
        ValueError: the name is taken, or the class is not a MoERouter.
    """
    if not (isinstance(router, type) and issubclass(router, MoERouter)):
        raise ValueError(
            f"router '{name}' is {router!r}; derive a class from moe_ext.routers.MoERouter"
        )
    registry.add(ROUTERS, name, router, kind="router")


__all__ = [
    "ROUTERS",
    "DenseRouting",
    "ExpertChoiceRouter",
    "GroupedExpertChoiceRouter",
    "MoERouter",
    "Routing",
    "SoftmaxTopKRouter",
    "TopKSoftmaxRouter",
    "get_router",
    "register_router",
]
