"""Registers a custom router and learning-rate decay, and trains with them.

It takes the flags of tools/pretrain.py; README.md has the command.
"""

import math
import sys

from torch import Tensor

from megatron.trainer.optim.schedules import register_decay
from moe_app.pretrain import command
from moe_ext.routers import MoERouter, Routing, register_router


class SigmoidTopKRouter(MoERouter):
    """Routes to the k experts with the largest sigmoid scores, weighted in proportion to them."""

    def select(self, logits: Tensor) -> Routing:
        """Route by logits [t, e]; see `MoERouter.select` for the result."""
        affinities = logits.float().sigmoid()  # [t, e]
        best, experts = affinities.topk(self.topk, dim=-1)  # [t, k]
        return Routing(
            experts=experts,
            gates=best / best.sum(dim=-1, keepdim=True),
            scores=affinities / affinities.sum(dim=-1, keepdim=True),
        )


def sqrt_decay(progress: float) -> float:
    """Return one minus the square root of the progress."""
    return 1.0 - math.sqrt(progress)


register_router("sigmoid_topk", SigmoidTopKRouter)
register_decay("sqrt", sqrt_decay)

if __name__ == "__main__":
    sys.exit(command.main())
