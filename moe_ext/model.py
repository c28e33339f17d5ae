"""Extends megatron-core's decoder-only model by exact positions and an exact vocabulary."""

import math
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from moe_ext.layers.head import VocabularyPart, linear_cross_entropy
from moe_ext.layers.rotary import PositionRotaryEmbedding


class LanguageModel(GPTModel):
    """Computes a GPTModel whose positions are `position_ids` and whose padding rows are masked.

    The embedding has rows beyond the vocabulary, so that tensor parallel ranks can share it. Their
    logits are -inf: they take no probability from the tokens, so that the loss does not depend on
    how much padding there is, and they are never generated.

    Args:
        num_token_ids: ids the vocabulary has; rows from there on are padding.
        kwargs: GPTModel's, with position_embedding_type "rope".
    """

    def __init__(self, *, num_token_ids: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_token_ids = num_token_ids
        if self.post_process and num_token_ids < self.vocab_size:
            self.output_layer.register_forward_hook(self._mask_padding)
        self.rotary_pos_emb = PositionRotaryEmbedding(
            self.config.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            cp_group=self.pg_collection.cp,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Computes logits, losses, or this pipeline stage's hidden states.

        Args:
            input_ids: [b, s] int64, this context parallel rank's positions.
            position_ids: [b, s] int64, where each token stands in its document; [1, s] when all
                rows are alike.
            attention_mask: [b, 1, s, s of the whole sequence] bool, True where a query must not
                look; None means causal.
            kwargs: GPTModel's, such as `labels` [b, s], and with them `loss_mask` [b, s]: what the
                losses will be multiplied with, up to one factor for all, which saves a product.

        Returns:
            On the last stage losses [b, s] if there are labels, else logits [b, s, v of this
            tensor parallel rank]; hidden states [s, b, h] on the others.
        """
        self.rotary_pos_emb.positions = position_ids
        try:
            output: Tensor = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        finally:
            self.rotary_pos_emb.positions = None
        return output

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Computes losses [b, s] if there are labels; else what GPTModel returns."""
        labels: Tensor | None = kwargs["labels"]
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states=hidden_states, **kwargs)
            return output
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        mask: Tensor | None = kwargs["loss_mask"]
        losses = linear_cross_entropy(
            hidden.flatten(0, 1),  # [t, h], token by token of the sequence
            self._output_weight(),
            labels.T.flatten(),
            None if mask is None else mask.T.flatten(),
            part=self._vocabulary_part(),
        )
        return losses.view(labels.T.shape).T.contiguous()  # [b, s]

    def _output_weight(self) -> Tensor:
        """Returns the output layer's weight [v of this rank, h]."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
            # The embedding adds a gradient too, so this one must come by autograd: a view has no
            # buffer to be added to.
            return weight.view_as(weight)
        weight = self.output_layer.weight
        return weight

    def _vocabulary_part(self) -> VocabularyPart:
        group = self.pg_collection.tp
        rows = self.vocab_size // group.size()
        first = rows * group.rank()
        return VocabularyPart(
            first=first,
            number=min(max(self.num_token_ids - first, 0), rows),
            num_token_ids=self.num_token_ids,
            group=group,
        )

    def _mask_padding(
        self, _layer: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> None:
        """Sets the logits of padding rows to -inf: [s, b, v] of all or of this rank's rows."""
        logits, _ = output
        rows = logits.shape[-1]
        if rows == self.vocab_size:
            real = self.num_token_ids
        else:
            real = self._vocabulary_part().number
        if real < rows:
            logits[..., real:].fill_(-math.inf)
