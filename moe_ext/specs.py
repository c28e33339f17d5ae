"""Translates a config to a layer spec: the one file where our blocks plug into megatron-core."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moe_ext.attention import MoASubmodules, SDPACoreAttention, get_attention
from moe_ext.config import MoEModelConfig
from moe_ext.experts import ExpertBackend, ExpertMLP
from moe_ext.experts.layer import ExpertsLayer, SharedByLayers
from moe_ext.functional import layer_coefficients
from moe_ext.layers.decoder import DecoderLayer
from moe_ext.layers.linear import ColumnParallelLinear, RowParallelLinear
from moe_ext.layers.norm import NonParametricLayerNorm, RMSNorm, norm_class
from moe_ext.layers.swiglu import MATRICES, DenseMLP
from moe_ext.metrics import MOA, MOE, RouterMetrics
from moe_ext.routers import MoERouter, get_router
from moe_ext.routers.balancing import Balancing


def block_spec(
    model: MoEModelConfig,
    config: TransformerConfig,
    *,
    metrics: Mapping[str, RouterMetrics],
    pg_collection: ProcessGroupCollection,
    virtual_stage: int | None,
    backend: ExpertBackend | None,
    shared: ExpertsLayer | None = None,
) -> TransformerBlockSubmodules:
    """Describes the layers that this pipeline stage builds.

    Args:
        model: the architecture.
        config: its translation, with the run's parallel sizes.
        metrics: where the routers of each kind record.
        pg_collection: this rank's process groups.
        virtual_stage: which of the rank's model chunks, None without interleaving.
        backend: what computes the experts, of every layer alike; None without experts.
        shared: the feed-forward of all layers with experts; None where each has its own.

    Raises:
        ValueError: a block is named that nobody registered.
    """
    norm = norm_class(model.normalization)
    dense = _dense_spec(model, pg_collection)
    experts = (
        _experts_spec(model, metrics, pg_collection, backend) if shared is None else _shared(shared)
    )
    stage = pg_collection.pp.rank()
    first = get_transformer_layer_offset(config, vp_stage=virtual_stage, pp_rank=stage) + 1
    number = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=stage)
    layers = [
        ModuleSpec(
            module=DecoderLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=_attention_spec(model, metrics, backend),
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=norm,
                mlp=experts if model.has_experts(layer) else dense,
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for layer in range(first, first + number)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm_spec(model))


def shared_feed_forward(
    model: MoEModelConfig,
    config: TransformerConfig,
    *,
    metrics: Mapping[str, RouterMetrics],
    pg_collection: ProcessGroupCollection,
    backend: ExpertBackend | None,
) -> ExpertsLayer:
    """Builds the one feed-forward of experts that layers share; arguments as `block_spec`'s."""
    spec = _experts_spec(model, metrics, pg_collection, backend)
    layer = None if spec is None else spec(config=config)
    assert isinstance(layer, ExpertsLayer), "`config_checks` refuses shared layers without experts"
    layer.moe_layer_recompute = False  # `SharedByLayers` does it, and knows the layer
    return layer


@dataclass(frozen=True, kw_only=True)
class _FeedForwardSpec:
    """Holds what megatron-core's `build_module` reads of a spec, and can be called instead.

    TransformerLayer hands process groups to the feed-forward classes that it knows and warns about
    any other ModuleSpec (0.16) or about all of them (0.19); of what is none it asks nothing. 0.16
    gives this to `build_module`; 0.19 calls it.
    """

    module: type[MegatronModule]
    params: dict[str, Any]
    submodules: MoESubmodules | MLPSubmodules | None

    def __call__(self, *, config: TransformerConfig, **_others: object) -> MegatronModule:
        """Build the layer; what else megatron-core knows of its place is not needed."""
        return self.module(config=config, submodules=self.submodules, **self.params)


def _final_norm_spec(
    model: MoEModelConfig,
) -> ModuleSpec | type[RMSNorm] | type[NonParametricLayerNorm]:
    norm = norm_class(model.normalization)
    if model.final_norm_epsilon is None:
        return norm
    return ModuleSpec(module=norm, params={"own_eps": model.final_norm_epsilon})


def _attention_spec(
    model: MoEModelConfig, metrics: Mapping[str, RouterMetrics], backend: ExpertBackend | None
) -> ModuleSpec:
    if model.attention_experts is not None:
        return _moa_spec(model, metrics[MOA], backend, num_experts=model.attention_experts)
    of_norms = {}
    if model.attention == "full_width_qk_norm":
        of_norms = {"has_norm_weights": model.has_norm_weights}
    return ModuleSpec(
        module=get_attention(model.attention),
        params={"attn_mask_type": AttnMaskType.causal, **of_norms},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )


def _moa_spec(
    model: MoEModelConfig,
    metrics: RouterMetrics,
    backend: ExpertBackend | None,
    *,
    num_experts: int,
) -> ModuleSpec:
    size = {"num_experts": num_experts, "topk": model.attention_topk}
    return ModuleSpec(
        module=get_attention(model.attention),
        params={
            "attn_mask_type": AttnMaskType.causal,
            "backend": backend,
            **size,
        },
        submodules=MoASubmodules(
            router=_router(model, metrics, num_layers=model.num_layers, **size),
            core_attention=SDPACoreAttention,
        ),
    )


def _dense_spec(model: MoEModelConfig, pg_collection: ProcessGroupCollection) -> _FeedForwardSpec:
    return _FeedForwardSpec(
        module=DenseMLP,
        params={"ffn_hidden_size": model.ffn_hidden_size, "pg_collection": pg_collection},
        submodules=MATRICES,
    )


def _shared(layer: ExpertsLayer) -> _FeedForwardSpec:
    return _FeedForwardSpec(module=SharedByLayers, params={"shared": layer}, submodules=None)


def _experts_spec(
    model: MoEModelConfig,
    metrics: Mapping[str, RouterMetrics],
    pg_collection: ProcessGroupCollection,
    backend: ExpertBackend | None,
) -> _FeedForwardSpec | None:
    if model.num_experts is None:
        return None
    router = _router(
        model,
        metrics[MOE],
        num_experts=model.num_experts,
        topk=model.moe_router_topk,
        num_layers=model.num_moe_layers,
    )
    experts = ModuleSpec(module=ExpertMLP, params={"backend": backend})
    submodules = MoESubmodules(experts=experts, router=router)
    return _FeedForwardSpec(
        module=ExpertsLayer,
        params={
            "pg_collection": pg_collection,
            "has_output_bias": model.moe_output_bias,
            "shared_width": model.moe_shared_expert_intermediate_size,
        },
        submodules=submodules,
    )


def _router(
    model: MoEModelConfig, metrics: RouterMetrics, *, num_experts: int, topk: int, num_layers: int
) -> functools.partial[MoERouter]:
    aux_loss_coeff, z_loss_coeff = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=num_layers,
        topk=topk,
    )
    return functools.partial(
        get_router(model.router),
        aux_loss_coeff=aux_loss_coeff,
        z_loss_coeff=z_loss_coeff,
        router_dtype=torch.float32 if model.moe_router_dtype == "fp32" else None,
        metrics=metrics,
        num_experts=num_experts,
        topk=topk,
        balancing=Balancing(
            loss=model.moe_router_load_balancing_type,
            has_bias=model.moe_router_enable_expert_bias,
            bias_rate=model.moe_router_bias_update_rate,
            capacity_factor=model.moe_expert_capacity_factor,
            drop_policy=model.moe_token_drop_policy,
        ),
    )
