"""megatron-core's decoder-only model, with positions that follow the position ids."""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from moe_ext.rotary import PositionRotaryEmbedding


class LanguageModel(GPTModel):
    """A GPTModel whose rotary embedding is computed from `position_ids`.

    Arguments of the constructor are GPTModel's, with position_embedding_type "rope".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        """Logits, losses, or this pipeline stage's hidden states.

        Args:
            input_ids: [b, s] int64, this context parallel rank's positions.
            position_ids: [b, s] int64, where each token stands in its document; [1, s] when all
                rows are alike.
            attention_mask: [b, 1, s, s of the whole sequence] bool, True where a query must not
                look; None means causal.
            kwargs: GPTModel's, such as `labels` [b, s].

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
