"""OLMoE's routing rule."""

from torch import Tensor

from moe_ext.functional import softmax_topk
from moe_ext.routers.base import MoERouter


class SoftmaxTopKRouter(MoERouter):
    """Softmax over all experts, top-k, not normalised again."""

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `functional.softmax_topk`."""
        return softmax_topk(logits, self.topk)
