"""Holds JetMoE's routing rule."""

from torch import Tensor

from moe_ext.functional import Routing, topk_softmax
from moe_ext.routers.base import MoERouter


class TopKSoftmaxRouter(MoERouter):
    """Takes the k largest logits, then applies softmax over those."""

    uses_expert_bias = True
    fused_rule = "topk_softmax"

    def select(self, logits: Tensor) -> Routing:
        """Applies `functional.topk_softmax`."""
        return topk_softmax(logits, self.topk, self.expert_bias)
