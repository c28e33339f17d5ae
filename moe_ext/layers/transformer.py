"""Translates MoEModelConfig to megatron-core's TransformerConfig, which is made here alone."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_ext.compat import without_cuda_graphs
from moe_ext.config import MoEModelConfig
from moe_ext.kernels.fused import FusedKernels


@dataclass
class FusedTransformerConfig(TransformerConfig):
    """Adds to what megatron-core hands every layer what the layers here need to know."""

    fused_kernels: FusedKernels = "auto"
    """Whether kernels may compute instead of torch's functions."""


def transformer_config(model: MoEModelConfig, *, bf16: bool, **runtime: Any) -> TransformerConfig:
    """Describes `model` to megatron-core.

    Auxiliary losses, routing rule and expert compute are left out on purpose: the blocks in
    `specs` bring them, so megatron-core's own are switched off.

    Args:
        model: the architecture.
        bf16: parameters and activations in bfloat16.
        runtime: TransformerConfig fields that belong to the run, not to the model: parallel sizes,
            sequence_parallel, recompute settings, initialization flags.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    is_moe = model.num_experts is not None
    has_router = is_moe or model.attention_experts is not None
    return FusedTransformerConfig(
        fused_kernels=model.fused_kernels,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.moe_ffn_hidden_size if is_moe else model.ffn_hidden_size,
        # Without it the schedules do not scale what routers add to the loss, whichever layers' they
        # are. A dense feed-forward layer does not read it.
        num_moe_experts=model.num_experts if is_moe else model.attention_experts,
        moe_ffn_hidden_size=_expert_width(model) if has_router else None,
        # Layers that are not alike have names of their own in a checkpoint.
        moe_layer_freq=_pattern(model) if is_moe and model.has_dense_layers else 1,
        moe_router_topk=model.moe_router_topk,
        moe_router_pre_softmax=True,  # read by megatron-core's own router alone
        # What our routers hand to the dispatchers; the gate's own precision is theirs to choose.
        moe_router_dtype="fp32" if has_router else None,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=model.moe_token_dispatcher_type,
        # Says to the dispatchers that not every token has k rows; its value is not read.
        moe_expert_capacity_factor=1.0 if model.has_varying_experts else None,
        normalization="RMSNorm" if model.has_norm_weights else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **without_cuda_graphs(),
        # Weights are drawn in `init`, by name; megatron-core only sets the parameters' attributes.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        **runtime,
    )


def _pattern(model: MoEModelConfig) -> list[int]:
    """Returns for each layer 1 if it has experts, else 0."""
    return [int(model.has_experts(number + 1)) for number in range(model.num_layers)]


def _expert_width(model: MoEModelConfig) -> int | None:
    """Returns the width that megatron-core wants beside `num_moe_experts`, dense or not."""
    return model.ffn_hidden_size if model.num_experts is None else model.moe_ffn_hidden_size


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
