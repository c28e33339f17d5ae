"""Defines a decoder layer that tells both of its routers where padding is."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DecoderLayer(TransformerLayer):
    """Computes megatron-core's layer, with padding known to its feed-forward layer and attention.

    megatron-core's block has an argument for padding, but some of its paths leave it out (0.16:
    layers that are not recomputed among others that are), and no layer hands it to attention. What
    always arrives, in every path and again in recomputation, is `context_mask`, the mask of a cross
    attention that a decoder does not have: padding comes by it.
    """

    def forward(
        self, *args: Any, context_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the layer.

        Args:
            args: megatron-core's.
            context_mask: [b, s] bool of this rank's tokens, True where none is; None for none.
            kwargs: megatron-core's.

        Returns:
            Hidden states [s, b, h], and None for there is no context.
        """
        attention = self.self_attention
        if not hasattr(attention, "padding_mask"):  # it routes nothing
            return super().forward(*args, **{**kwargs, "padding_mask": context_mask})
        attention.padding_mask = context_mask
        try:
            return super().forward(*args, **{**kwargs, "padding_mask": context_mask})
        finally:
            attention.padding_mask = None
