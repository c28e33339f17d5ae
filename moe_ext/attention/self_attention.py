"""Computes self-attention with a norm over the whole width of q and of k."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from moe_ext.kernels import fused
from moe_ext.layers.norm import (
    split_unit_rms,
    split_unit_variance,
    unit_variance,
    weighted_unit_rms,
)
from moe_ext.layers.parameters import new_parameter


class FullWidthRMSNorm(MegatronModule):
    """Applies RMSNorm over all heads of a projection jointly; heads are split over ranks.

    The mean square is that of the whole vector, reduced over the tensor parallel group. The weight
    is split with the heads, so each rank owns and updates its slice; it is not marked
    `sequence_parallel`, for a rank sees every position here.

    Args:
        config: gives the parameter's dtype, place, and eps (layernorm_epsilon).
        num_heads: heads on this rank.
        head_size: hn.
        tp_group: tensor parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_heads: int,
        head_size: int,
        tp_group: Any,
    ) -> None:
        super().__init__(config=config)
        self.eps: float = config.layernorm_epsilon
        self.tp_group = tp_group
        self.weight = new_parameter(num_heads * head_size, config=config)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        nn.init.ones_(self.weight)
        self.fused_kernels = fused.setting_of(config)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalises [s, b, heads of this rank, hn], same shape out."""
        if self.tp_group.size() == 1:
            return weighted_unit_rms(heads, self.weight, self.eps, fused_kernels=self.fused_kernels)
        flat = heads.flatten(2)  # [s, b, heads * hn]
        normed = split_unit_rms(flat, self.eps, group=self.tp_group) * self.weight
        return normed.view(heads.shape)  # [s, b, heads, hn]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describes the weight, split over tensor parallel ranks on its only axis."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


class FullWidthLayerNorm(MegatronModule):
    """Applies LayerNorm without weight and bias over all heads of a projection jointly.

    Mean and variance are those of the whole vector, reduced over the tensor parallel group.

    Args:
        config: gives eps (layernorm_epsilon).
        num_heads: not needed.
        head_size: not needed.
        tp_group: tensor parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, *, num_heads: int, head_size: int, tp_group: Any
    ) -> None:
        super().__init__(config=config)
        del num_heads, head_size
        self.eps: float = config.layernorm_epsilon
        self.tp_group = tp_group

    def forward(self, heads: Tensor) -> Tensor:
        """Normalises [s, b, heads of this rank, hn], same shape out."""
        flat = heads.flatten(2)  # [s, b, heads * hn]
        if self.tp_group.size() == 1:
            return unit_variance(flat, self.eps).view(heads.shape)
        return split_unit_variance(flat, self.eps, group=self.tp_group).view(heads.shape)


class QKNormSelfAttention(SelfAttention):
    """Adds OLMoE's norm of q and k, before the rotary embedding, to megatron-core's attention.

    megatron-core's own `qk_layernorm` normalises each head by itself; here one norm spans all
    query heads and one all key heads, under any tensor parallel size. It is of the kind of the
    layers' norms: RMSNorm with a weight, or LayerNorm without parameters.

    Raises:
        ValueError: a key head would have to be shared by several tensor parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        has_norm_weights: bool = True,
        **others: Any,  # megatron-core 0.19: name
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **others,
        )
        if config.num_query_groups % self.world_size:
            raise ValueError(
                f"num_query_groups ({config.num_query_groups}) must be a multiple of the tensor "
                f"parallel size ({self.world_size}) for QK-norm over the whole width"
            )
        self._angles: Tensor | None = None
        head_size = self.hidden_size_per_attention_head
        norm: type[Any] = FullWidthRMSNorm if has_norm_weights else FullWidthLayerNorm
        self.q_norm = norm(
            config,
            num_heads=self.num_attention_heads_per_partition,
            head_size=head_size,
            tp_group=self.tp_group,
        )
        self.k_norm = norm(
            config,
            num_heads=self.num_query_groups_per_partition,
            head_size=head_size,
            tp_group=self.tp_group,
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes megatron-core's output and bias; the angles go to a kernel where one takes them.

        The kernel normalises and rotates at once, so megatron-core is then given no angles.
        """
        angles = kwargs.get("rotary_pos_emb")
        if self._is_fused(hidden_states, angles, kwargs):
            self._angles, kwargs["rotary_pos_emb"] = angles, None
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._angles = None

    def _is_fused(self, hidden: Tensor, angles: Tensor | None, others: dict[str, Any]) -> bool:
        """Says whether a kernel normalises and rotates queries and keys."""
        packed = others.get("packed_seq_params")
        is_plain = (
            isinstance(angles, Tensor)
            and isinstance(self.q_norm, FullWidthRMSNorm)
            and self.tp_group.size() == 1
            and others.get("inference_context") is None
            and getattr(packed, "qkv_format", None) != "thd"
            and not self.config.rotary_interleaved
        )
        if not is_plain or not fused.takes(fused.setting_of(self.config), hidden):
            return False
        from moe_ext.kernels.rms_norm import WIDEST

        weights: tuple[Tensor, ...] = (self.q_norm.weight, self.k_norm.weight)
        return all(each.dtype == hidden.dtype and len(each) <= WIDEST for each in weights)

    def _normalise(self, heads: Tensor, norm: Any) -> Tensor:
        """Normalises [s, b, heads, hn], and rotates it where the angles are this class's to use."""
        if self._angles is None:
            normed: Tensor = norm(heads)
            return normed
        from moe_ext.kernels.rotated_norm import rotated_norm

        return rotated_norm(heads, norm.weight, self._angles, norm.eps)

    def get_query_key_value_tensors(
        self, *args: Any, split_qkv: bool = True, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Projects to q, k and v, and normalises q and k.

        Returns:
            query [s, b, np, hn], key and value [s, b, ng, hn] of this rank's heads, and the output
            gate if the config has one.

        Raises:
            ValueError: the fused rotary embedding asks for q, k and v in one tensor.
        """
        if not split_qkv:
            raise ValueError(
                "fused_single_qkv_rope is True, but QK-norm needs q and k apart; set it to False"
            )
        query, key, *rest = super().get_query_key_value_tensors(
            *args, split_qkv=split_qkv, **kwargs
        )
        return self._normalise(query, self.q_norm), self._normalise(key, self.k_norm), *rest
