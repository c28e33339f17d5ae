"""Defines the mixture of attention heads: experts project queries and outputs of attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.attention.projections import AttentionExperts, KeyValueProjection
from moe_ext.experts.interface import ExpertBackend
from moe_ext.experts.slots import ExpertOrder, sort_by_expert
from moe_ext.functional import Routing
from moe_ext.kernels import fused
from moe_ext.layers.parameters import new_parameter
from moe_ext.routers.base import MoERouter


@dataclass(frozen=True)
class MoASubmodules:
    """Holds what a `MoASelfAttention` is built from."""

    router: Callable[..., MoERouter]
    """Called with megatron-core's config and `pg_collection`."""
    core_attention: Callable[..., MegatronModule]
    """Called as megatron-core's self-attention calls its own."""


class MoASelfAttention(MegatronModule):
    """Computes JetMoE's mixture of attention heads, in place of megatron-core's self-attention.

    Each token is sent to k of e experts. An expert gives it one query head for each of the ng
    key/value heads, which all experts share, and projects what these heads found back to h:

        y = sum over slots j of gate_j * W_o[e_j] attention(W_q[e_j] x, W_k x, W_v x) + bias

    Head g of slot j attends with key/value head g. So that this is ordinary grouped-query attention
    without a copy of keys and values, query heads are put in the order g * k + j.

    The gate multiplies what attention found: W_o is linear, so that is the output's gate. The bias
    [h] belongs to no expert, and no gate multiplies it.

    Tensor parallel ranks hold ng / TP heads of every expert, and sum their outputs at the end. With
    sequence parallelism each routes its part of the sequence. Experts are not split over expert
    parallel ranks.

    Source: JetMoE (arXiv 2404.07413), sections 2.1 and 2.3.

    Args:
        config: megatron-core's; num_query_groups is ng, num_attention_heads is ng * k.
        submodules: router and core attention.
        layer_number: 1 is the model's first, on whatever pipeline stage.
        attn_mask_type: of the core attention.
        cp_comm_type: handed on to the core attention.
        pg_collection: this rank's groups; tp, cp and tp_cp are used.
        num_experts: e.
        topk: k.
        backend: what multiplies by the experts' matrices; it must have a projection.
        name: where in the model, as megatron-core 0.19 says; not needed.

    Raises:
        ValueError: the heads do not fit the experts or the tensor parallel ranks.
    """

    padding_mask: Tensor | None
    """[b, s] bool of this rank's tokens, True where none is; the layer sets it for each call."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoASubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        num_experts: int,
        topk: int,
        backend: ExpertBackend,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        del name
        _check_heads(config, topk, pg_collection.tp.size())
        self.padding_mask: Tensor | None = None
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.num_experts = num_experts
        self.topk = topk
        self.num_groups = config.num_query_groups // pg_collection.tp.size()
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        self.checkpoint_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        self.router = submodules.router(config=config, pg_collection=pg_collection)
        self.router.set_layer_number(layer_number)
        self.linear_kv = KeyValueProjection(
            config, num_groups=self.num_groups, pg_collection=pg_collection
        )
        self.experts = AttentionExperts(
            config,
            num_experts=num_experts,
            num_groups=self.num_groups,
            backend=backend,
            pg_collection=pg_collection,
        )
        self.core_attention = submodules.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.output_bias = new_parameter(config.hidden_size, config=config)
        # Each rank adds it to its part of the sequence: megatron-core sums the parts' gradients.
        self.output_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        nn.init.zeros_(self.output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """Attends from each token to those before it.

        Args:
            hidden_states: [s, b, h], this rank's part of the sequence under sequence parallelism.
            attention_mask: handed on to the core attention.
            rotary_pos_emb: [s, 1 or b, 1, hn] angles, for the whole sequence; None for none.
            attention_bias: handed on to the core attention.
            packed_seq_params: handed on to the core attention.
            others: what megatron-core hands to attentions of other kinds; all None.

        Returns:
            [s, b, h] of this rank's part of the sequence, the bias in it; and None, for the caller
            has no bias left to add.

        Raises:
            ValueError: one of the others is given.
        """
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but moa attention needs None")
        padding = None if self.padding_mask is None else self.padding_mask.T
        routing: Routing = self.router(hidden_states, padding)  # of this rank's tokens
        hidden, experts, gates = self._all_tokens(hidden_states, routing)
        order = sort_by_expert(
            experts,
            num_experts=self.num_experts,
            in_kernels=fused.takes(fused.setting_of(self.config), gates),
        )
        query = self._queries(hidden, order)  # [s, b, ng * k, hn]
        key, value_heads = self.linear_kv(hidden)  # [s, b, ng, hn]
        if rotary_pos_emb is not None:
            query, key = self._rotate(query, key, rotary_pos_emb)
        context = self._attend(
            query, key, value_heads, attention_mask, attention_bias, packed_seq_params
        )  # [s, b, ng * k * hn]
        output = self._outputs(context, gates, order)  # [s, b, h], this rank's heads
        if self.config.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        else:
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output + self.output_bias, None

    def _all_tokens(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Gathers hidden states, experts and gates of the whole sequence.

        Their gradients on a rank come from its heads alone: backward sums them over the ranks.
        """
        group, experts, gates = self.tp_group, routing.experts, routing.gates
        if not self.config.sequence_parallel:
            return (
                copy_to_tensor_model_parallel_region(hidden, group=group),
                experts,
                copy_to_tensor_model_parallel_region(gates, group=group),
            )
        return (
            gather_from_sequence_parallel_region(hidden, group=group),
            gather_from_sequence_parallel_region(experts, group=group),
            gather_from_sequence_parallel_region(gates, group=group),
        )

    def _queries(self, hidden: Tensor, order: ExpertOrder) -> Tensor:
        """Computes queries [s, b, ng * k, hn] of [s, b, h]; head g of slot j is at g * k + j."""
        rows = self.experts(hidden.flatten(0, 1), order, is_output=False)  # [t * k, ng * hn]
        heads = rows.view(*hidden.shape[:2], self.topk, self.num_groups, -1)  # [s, b, k, ng, hn]
        return heads.transpose(2, 3).flatten(2, 3)  # [s, b, ng * k, hn]

    def _rotate(
        self, query: Tensor, key: Tensor, angles: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        of_query, of_key = angles if isinstance(angles, tuple) else (angles, angles)
        query = apply_rotary_pos_emb(query, of_query, config=self.config, cp_group=self.cp_group)
        key = apply_rotary_pos_emb(key, of_key, config=self.config, cp_group=self.cp_group)
        return query, key

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Computes [s, b, ng * k * hn], again in backward if core attention is recomputed."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            context: Tensor = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )
            return context

        if self.checkpoint_core_attention and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(attend, False, query, key, value)
            return recomputed
        return attend(query, key, value)

    def _outputs(self, context: Tensor, gates: Tensor, order: ExpertOrder) -> Tensor:
        """Gates each slot's heads, projects them by their expert, sums the slots: [s, b, h].

        Args:
            context: [s, b, ng * k * hn] heads in the order g * k + j.
            gates: [t, k] weights, at least fp32.
            order: of the slots' rows.
        """
        heads = context.unflatten(2, (self.num_groups, self.topk, -1))  # [s, b, ng, k, hn]
        weights = gates.view(*context.shape[:2], self.topk, 1, 1)
        gated = (heads.transpose(2, 3) * weights).to(context.dtype)  # [s, b, k, ng, hn]
        rows = gated.flatten(0, 2).flatten(1)  # [t * k, ng * hn]
        output: Tensor = self.experts(rows, order, is_output=True)  # [t, h]
        return output.view(*context.shape[:2], -1)  # [s, b, h]


def _check_heads(config: TransformerConfig, topk: int, tensor_parallel_size: int) -> None:
    heads, groups = config.num_attention_heads, config.num_query_groups
    if heads != groups * topk:
        raise ValueError(
            f"num_attention_heads ({heads}) must be num_query_groups x experts per token"
            f" ({groups} x {topk}); use num_attention_heads {groups * topk}"
        )
    if groups % tensor_parallel_size:
        raise ValueError(
            f"num_query_groups ({groups}) must be a multiple of the tensor parallel size"
            f" ({tensor_parallel_size}), which splits moa attention by head"
        )
