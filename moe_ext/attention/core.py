"""Core attention on torch's scaled dot product attention."""

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_MASKS = (AttnMaskType.causal, AttnMaskType.no_mask)


class SDPACoreAttention(MegatronModule):
    """softmax(scale q k^T) v by torch's fused kernels, with grouped key/value heads as they are.

    It stands where megatron-core's DotProductAttention does, and does less: causal or unmasked
    attention over whole sequences, without dropout. Everything else is refused.

    Args:
        config: megatron-core's.
        layer_number: not needed.
        attn_mask_type: what a call without a type of its own means.
        attention_type: not needed.
        attention_dropout: must be 0 or None, which takes the config's.
        softmax_scale: None means 1 / sqrt(hn).
        cp_comm_type: not needed.
        pg_collection: this rank's groups.

    Raises:
        ValueError: the config asks for what this attention does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _require("context_parallel_size", config.context_parallel_size, 1)
        _require("attention_dropout", dropout, 0.0)
        _require("window_size", config.window_size, None)
        _require("softmax_type", config.softmax_type, "vanilla")
        _require("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling, False)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        if pg_collection is not None:
            self.tp_group = pg_collection.tp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, np, hn] heads of this rank.
            key: [s, b, ng, hn] key heads of this rank; np is a multiple of ng.
            value: [s, b, ng, hn] value heads of this rank.
            attention_mask: must be None; the mask's type says it all.
            attn_mask_type: causal or no_mask; None means the constructor's.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [s, b, np * hn].

        Raises:
            ValueError: a mask, a bias, packed sequences or another mask type is given, or causal
                attention with queries and keys of different lengths.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        _require("attention_bias", attention_bias, None)
        _require("packed_seq_params", packed_seq_params, None)
        if mask_type not in _MASKS:
            raise ValueError(
                f"attn_mask_type is {mask_type.name}, but this attention knows "
                f"{' and '.join(mask.name for mask in _MASKS)}"
            )
        if attention_mask is not None:
            raise ValueError(
                f"got an attention_mask {list(attention_mask.shape)} with attn_mask_type "
                f"{mask_type.name}, which needs none and would ignore it; pass None"
            )
        is_causal = mask_type == AttnMaskType.causal
        if is_causal and query.shape[0] != key.shape[0]:
            raise ValueError(
                f"causal attention needs as many queries ({query.shape[0]}) as keys "
                f"({key.shape[0]}); use attn_mask_type no_mask for a single new token"
            )
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [b, np, s, hn]
            key.permute(1, 2, 0, 3),  # [b, ng, s, hn]
            value.permute(1, 2, 0, 3),  # [b, ng, s, hn]
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )  # [b, np, s, hn]
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()  # [s, b, np * hn]


def _require(name: str, value: object, required: object) -> None:
    if value != required:
        raise ValueError(f"{name} is {value!r}, but SDPACoreAttention needs {required!r}")
