"""Config -> layer spec: the one file where our blocks plug into megatron-core."""

import functools

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from moe_ext.attention import SDPACoreAttention, get_attention
from moe_ext.config import MoEModelConfig
from moe_ext.experts import ExpertMLP
from moe_ext.functional import layer_coefficients
from moe_ext.metrics import RouterMetrics
from moe_ext.norm import RMSNorm
from moe_ext.routers import get_router


def block_spec(
    model: MoEModelConfig,
    config: TransformerConfig,
    *,
    metrics: RouterMetrics | None,
    pipeline_rank: int,
    virtual_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage builds.

    Args:
        model: the architecture.
        config: its translation, with the run's parallel sizes.
        metrics: where the routers record; None for a dense model.
        pipeline_rank: this rank's stage.
        virtual_stage: which of the rank's model chunks, None without interleaving.
    """
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention_spec(model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_dense_spec(model) if metrics is None else _moe_spec(model, metrics),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _attention_spec(model: MoEModelConfig) -> ModuleSpec:
    return ModuleSpec(
        module=get_attention(model.attention),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )


def _dense_spec(model: MoEModelConfig) -> ModuleSpec:
    return ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": model.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )


def _moe_spec(model: MoEModelConfig, metrics: RouterMetrics) -> ModuleSpec:
    aux_loss_coeff, z_loss_coeff = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=model.num_layers,
        topk=model.moe_router_topk,
    )
    router = functools.partial(
        get_router(model.router),
        aux_loss_coeff=aux_loss_coeff,
        z_loss_coeff=z_loss_coeff,
        router_dtype=torch.float32 if model.moe_router_dtype == "fp32" else None,
        metrics=metrics,
    )
    experts = ModuleSpec(module=ExpertMLP, params={"backend": model.expert_backend})
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=router))
