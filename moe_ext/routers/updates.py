"""Changes what of the routers changes once a step: counts of the step, and biases of experts."""

from collections.abc import Iterable

from torch import nn

from moe_ext.routers.balancing import move_biases
from moe_ext.routers.base import MoERouter


class RouterUpdates:
    """Begins and finishes a step for the routers of this rank's model chunks.

    Args:
        chunks: the model, wrapped or not.
    """

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self._routers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, MoERouter)
        ]

    def begin(self) -> None:
        """Forgets the micro-batches of the step before, whether it was taken or not."""
        for router in self._routers:
            router.step.reset()

    def finish(self) -> None:
        """Moves each bias by the loads of the step's global batch; a collective call.

        A bias is part of its router: where the router's weight is frozen, it stays.
        """
        move_biases(
            [
                (router.step, router.expert_bias, router.balancing.bias_rate)
                for router in self._routers
                if router.expert_bias is not None and router.weight.requires_grad
            ]
        )
