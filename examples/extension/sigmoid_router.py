"""A router and a learning-rate decay of one's own, trained without touching the packages.

Start it as tools/pretrain.py is started, with PYTHONPATH=tools; README.md has the command.
"""

import math
import sys

import torch
from torch import Tensor

from megatron.trainer.optim.schedules import register_decay
from moe_app.pretrain import pretrain
from moe_ext.routers import MoERouter, register_router


class SigmoidTopKRouter(MoERouter):
    """Each expert scores a token by itself; the k best share it in proportion to their scores."""

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the rule to logits [t, e]; what is returned is in `MoERouter.select`."""
        gates = logits.float().sigmoid()  # [t, e]
        best = gates.topk(self.topk, dim=-1).indices  # [t, k]
        routing_map = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, best, True)  # [t, e]
        chosen = gates.masked_fill(~routing_map, 0.0)  # [t, e]
        probs = chosen / chosen.sum(dim=-1, keepdim=True)
        return probs, routing_map, gates / gates.sum(dim=-1, keepdim=True)


def sqrt_decay(done: float) -> float:
    """One minus the square root of the share that is done."""
    return 1.0 - math.sqrt(done)


register_router("sigmoid_topk", SigmoidTopKRouter)
register_decay("sqrt", sqrt_decay)

if __name__ == "__main__":
    sys.exit(pretrain.main())
