"""A router and a learning-rate decay of one's own, trained without touching the packages.

Start it as tools/pretrain.py is started, with PYTHONPATH=tools; README.md has the command.
"""

import math
import sys

from torch import Tensor

from megatron.trainer.optim.schedules import register_decay
from moe_app.pretrain import pretrain
from moe_ext.routers import MoERouter, Routing, register_router


class SigmoidTopKRouter(MoERouter):
    """Lets each expert mark a token by itself; the k best share it in proportion to their marks."""

    def select(self, logits: Tensor) -> Routing:
        """Applies the rule to logits [t, e]; `MoERouter.select` says what is returned."""
        marks = logits.float().sigmoid()  # [t, e]
        best, experts = marks.topk(self.topk, dim=-1)  # [t, k]
        return Routing(
            experts=experts,
            gates=best / best.sum(dim=-1, keepdim=True),
            scores=marks / marks.sum(dim=-1, keepdim=True),
        )


def sqrt_decay(done: float) -> float:
    """One minus the square root of the share that is done."""
    return 1.0 - math.sqrt(done)


register_router("sigmoid_topk", SigmoidTopKRouter)
register_decay("sqrt", sqrt_decay)

if __name__ == "__main__":
    sys.exit(pretrain.main())
