"""Builds a decoder-only model from megatron-core's parts, with exact positions and vocabulary."""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.attention.packed import PackedDocuments, pack_documents
from moe_ext.kernels import fused
from moe_ext.layers.head import VocabularyPart, linear_cross_entropy
from moe_ext.layers.output_layer import OutputLayer
from moe_ext.layers.rotary import RotaryAngles


class LanguageModel(LanguageModule):
    """Computes a pipeline stage's chunk of a decoder-only transformer: embedding, layers, head.

    Names of parameters and the contract with megatron-core's schedules are those of its GPTModel,
    so that checkpoints of one are checkpoints of the other. Positions are the batch's
    `position_ids`. The embedding has rows beyond the vocabulary, so that tensor parallel ranks can
    share it. Their logits are -inf: they take no probability from the tokens, so that the loss does
    not depend on how much padding there is, and they are never generated.

    Args:
        config: shared by all chunks.
        block: the layers of this chunk, from `specs.block_spec`.
        vocab_size: rows of the embedding, over all tensor parallel ranks.
        num_token_ids: ids the vocabulary has; rows from there on are padding.
        max_sequence_length: longest sequence the model will see (s).
        rotary_base: base of RoPE's wavelengths.
        pre_process: the chunk has the embedding.
        post_process: the chunk has the final norm and the head.
        share_embeddings_and_output_weights: the head's weight is the embedding's.
        pg_collection: this rank's process groups.
        vp_stage: which of the rank's chunks, None without interleaving.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        *,
        vocab_size: int,
        num_token_ids: int,
        max_sequence_length: int,
        rotary_base: float,
        pre_process: bool,
        post_process: bool,
        share_embeddings_and_output_weights: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder  # read by the schedules
        self.vocab_size = vocab_size
        self.num_token_ids = num_token_ids
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.vp_stage = vp_stage
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type="rope",
                tp_group=pg_collection.tp,
            )
        self.rotary_angles = RotaryAngles(config.kv_channels, base=rotary_base)
        self.decoder = TransformerBlock(
            config=config,
            spec=block,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                tp_group=pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Takes the previous stage's hidden states [s, b, h], alone or in a list of one."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor:
        """Computes logits, losses, or this pipeline stage's hidden states.

        Args:
            input_ids: [b, s] int64, this context parallel rank's positions.
            position_ids: [b, s] int64, where each token stands in its document; [1, s] when all
                rows are alike.
            attention_mask: [b, 1, s, s of the whole sequence] bool, True where a query must not
                look; None means causal.
            labels: [b, s] int64, the tokens to predict; None for logits.
            loss_mask: [b, s], what the losses will be multiplied with, up to one factor for all,
                which saves a product; None where it is not known.
            padding_mask: [b, s] bool, True where no token is, which the losses and counts of the
                routers leave out; None for no padding.
            cu_seqlens: [n + 1] int32 in host memory, where the n documents of all rows begin, row
                after row of the whole sequences, and at last where they end: attention computes
                each on its own. None where it crosses them, or where a mask keeps them apart.
            runtime_gather_output: gather the logits of all tensor parallel ranks.

        Returns:
            On the last stage losses [b, s] if there are labels, else logits [b, s, v], or
            [b, s, v of this tensor parallel rank] where they are not gathered; hidden states
            [s, b, h] on the others.
        """
        hidden_states = self.decoder(
            hidden_states=self._embed(input_ids, position_ids) if self.pre_process else None,
            attention_mask=attention_mask,
            context_mask=self._own_part(padding_mask),
            rotary_pos_emb=self.rotary_angles(position_ids),
            packed_seq_params=self._packed(input_ids, cu_seqlens),
        )  # [s, b, h], this rank's part of s under sequence parallelism
        if not self.post_process:
            return hidden_states
        tied = self._tied_weight()
        if labels is not None:
            losses: Tensor
            losses, _ = self.output_layer(
                hidden_states,
                # The embedding adds a gradient too, so the head's must come by autograd: a view
                # has no buffer to be added to.
                None if tied is None else tied.view_as(tied),
                compute=partial(self._losses, labels=labels, loss_mask=loss_mask),
            )
            return losses
        logits, _ = self.output_layer(
            hidden_states, weight=tied, runtime_gather_output=runtime_gather_output
        )  # [s, b, v]
        self._mask_padding(logits)
        output: Tensor = logits.transpose(0, 1).contiguous()  # [b, s, v]
        return output

    def _packed(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> PackedDocuments | None:
        """Returns what core attention needs to know of documents, which all layers share."""
        if cu_seqlens is None:
            return None
        ranks = self.config.context_parallel_size
        return pack_documents(
            cu_seqlens,
            num_rows=input_ids.shape[0],
            length=input_ids.shape[1] * ranks,
            device=input_ids.device,
        )

    def _own_part(self, padding_mask: Tensor | None) -> Tensor | None:
        """Returns the columns of [b, s] that are this rank's under sequence parallelism."""
        if padding_mask is None or not self.config.sequence_parallel:
            return padding_mask
        group = self.pg_collection.tp
        return padding_mask.chunk(group.size(), dim=1)[group.rank()].contiguous()

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embeds tokens [b, s] as [s, b, h], this rank's part of s under sequence parallelism."""
        hidden: Tensor = self.embedding(input_ids, position_ids)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # The embedding is frozen. A recomputed layer has gradients only if its input has.
            hidden.requires_grad_(self.config.recompute_granularity is not None)
        return hidden

    def _losses(
        self, hidden_states: Tensor, weight: Tensor, *, labels: Tensor, loss_mask: Tensor | None
    ) -> Tensor:
        """Computes the cross-entropy [b, s] of labels [b, s]; see `forward`.

        Args:
            hidden_states: [s, b, h], this rank's part of s under sequence parallelism.
            weight: [v of this rank, h] of the head.
            labels: [b, s].
            loss_mask: [b, s], or None.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        losses = linear_cross_entropy(
            hidden.flatten(0, 1),  # [t, h], token by token of the sequence
            weight,
            labels.T.flatten(),
            None if loss_mask is None else loss_mask.T.flatten(),
            part=self._vocabulary_part(),
            fused_kernels=fused.setting_of(self.config),
        )
        return losses.view(labels.T.shape).T.contiguous()  # [b, s]

    def _tied_weight(self) -> Tensor | None:
        """Returns the embedding's weight [v of this rank, h] if the head shares it."""
        weight: Tensor | None = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
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

    def _mask_padding(self, logits: Tensor) -> None:
        """Sets the logits of padding rows to -inf: [s, b, v] of all or of this rank's rows."""
        if self.num_token_ids == self.vocab_size:
            return
        rows = logits.shape[-1]
        if rows == self.vocab_size:
            real = self.num_token_ids
        else:
            real = self._vocabulary_part().number
        if real < rows:
            logits[..., real:].fill_(-math.inf)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Describes this chunk's parameters under their global names.

        Args:
            prefix: of the names.
            sharded_offsets: none; the layers bring theirs.
            metadata: megatron-core's, on the form of the checkpoint.
        """
        state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Empty, and no checkpoint of a GPTModel has it.
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state
