"""Holds OLMoE's routing rule."""

from torch import Tensor

from moe_ext.functional import Routing, softmax_topk
from moe_ext.routers.base import MoERouter


class SoftmaxTopKRouter(MoERouter):
    """Applies softmax over all experts, then takes the k largest as they are."""

    uses_expert_bias = True
    fused_rule = "softmax_topk"

    def select(self, logits: Tensor) -> Routing:
        """Applies `functional.softmax_topk`."""
        return softmax_topk(logits, self.topk, self.expert_bias)
