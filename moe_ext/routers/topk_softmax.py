"""JetMoE's routing rule."""

from torch import Tensor

from moe_ext.functional import topk_softmax
from moe_ext.routers.base import MoERouter


class TopKSoftmaxRouter(MoERouter):
    """Top-k logits, softmax over those."""

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `functional.topk_softmax`."""
        return topk_softmax(logits, self.topk)
