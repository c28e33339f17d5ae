"""Builds a language model, or this rank's part of one."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_ext.config import MoEModelConfig
from moe_ext.experts import BackendChoice, ExpertBackend, choose_backend, use_of_model
from moe_ext.init import initialize_adapters, initialize_weights
from moe_ext.layers.linear import ColumnParallelLinear
from moe_ext.layers.lora import LoRA
from moe_ext.layers.parameters import parameter_device_type
from moe_ext.metrics import MOA, MOE, RouterMetrics
from moe_ext.model import LanguageModel
from moe_ext.parameter_groups import group_of
from moe_ext.specs import block_spec, shared_feed_forward


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """Holds what a rank trains."""

    chunks: list[LanguageModel]
    """One model chunk, or one per virtual pipeline stage."""
    config: TransformerConfig
    """Shared by the chunks; the schedules keep their callbacks in it."""
    metrics: Mapping[str, RouterMetrics]
    """What the routers recorded, by their kind: metrics.MOE, metrics.MOA, both or neither."""
    backend: BackendChoice | None
    """What computes the experts, feed-forward and attention alike; None without experts."""


def build_model(
    model: MoEModelConfig,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection,
    seq_length: int,
    seed: int | None,
    recompute_activation: bool = False,
    lora: LoRA | None = None,
) -> BuiltModel:
    """Builds this rank's chunks of the model.

    Args:
        model: the architecture.
        config: from `transformer.transformer_config`.
        pg_collection: this rank's process groups.
        seq_length: longest sequence the model will see (s).
        seed: draws the initial weights; None leaves them undefined, to be loaded.
        recompute_activation: refuse expert backends that keep their activation for backward.
        lora: gives some weights adapters of low rank; None builds none.

    Raises:
        ValueError: a block is named that nobody registered, or no expert backend can be used.
    """
    backend = _choose_backend(model, config, recompute_activation=recompute_activation, lora=lora)
    experts = {MOE: model.num_experts, MOA: model.attention_experts}
    metrics = {
        kind: RouterMetrics(model.num_layers, number, is_varying=model.has_varying_experts)
        for kind, number in experts.items()
        if number is not None
    }
    chunks = [
        _build_chunk(
            model,
            config,
            stage,
            metrics=metrics,
            pg_collection=pg_collection,
            seq_length=seq_length,
            backend=None if backend is None else backend.backend,
        )
        for stage in range(config.virtual_pipeline_model_parallel_size or 1)
    ]
    if lora is not None:
        for chunk in chunks:
            _add_adapters(chunk, model, config, lora)
    if seed is not None:
        initialize_weights(
            list(chunks), seed=seed, std=model.init_method_std, cutoff=model.init_method_cutoff
        )
        initialize_adapters(list(chunks), seed=seed)
    return BuiltModel(chunks=chunks, config=config, metrics=metrics, backend=backend)


def _build_chunk(
    model: MoEModelConfig,
    config: TransformerConfig,
    stage: int,
    *,
    metrics: Mapping[str, RouterMetrics],
    pg_collection: ProcessGroupCollection,
    seq_length: int,
    backend: ExpertBackend | None,
) -> LanguageModel:
    """Builds the rank's chunk of virtual stage `stage`, from 0; arguments as `build_model`'s."""
    stages = config.virtual_pipeline_model_parallel_size or 1
    rank, size = pg_collection.pp.rank(), pg_collection.pp.size()
    virtual_stage = stage if stages > 1 else None
    parts = {"metrics": metrics, "pg_collection": pg_collection, "backend": backend}
    shared = shared_feed_forward(model, config, **parts) if model.moe_share_across_layers else None
    spec = block_spec(model, config, virtual_stage=virtual_stage, shared=shared, **parts)
    chunk = LanguageModel(
        config,
        spec,
        vocab_size=model.padded_vocab_size,
        num_token_ids=model.vocab_size,
        max_sequence_length=seq_length,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == size - 1 and stage == stages - 1,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_base=model.rotary_base,
        pg_collection=pg_collection,
        vp_stage=virtual_stage,
    )
    if shared is not None:
        chunk.decoder.mlp = shared  # its weights' place; the layers only refer to it
    return chunk


def _add_adapters(
    chunk: LanguageModel, model: MoEModelConfig, config: TransformerConfig, lora: LoRA
) -> None:
    """Gives adapters to the layers of the groups that `lora` names."""
    heads = config.num_attention_heads // config.num_query_groups
    qkv = tuple(config.kv_channels * number for number in (heads, 1, 1))
    for name, module in list(chunk.named_modules()):
        if not hasattr(module, "add_lora") or group_of(name, model) not in lora.targets:
            continue
        if isinstance(module, ColumnParallelLinear):
            module.add_lora(lora, parts=qkv)
        else:
            module.add_lora(lora)


def _choose_backend(
    model: MoEModelConfig,
    config: TransformerConfig,
    *,
    recompute_activation: bool,
    lora: LoRA | None,
) -> BackendChoice | None:
    use = use_of_model(
        model,
        device_type=parameter_device_type(config),
        dtype=config.params_dtype,
        tensor=config.tensor_model_parallel_size,
        expert_tensor=config.expert_tensor_parallel_size or 1,
        recompute_activation=recompute_activation,
        lora=lora,
    )
    return choose_backend(model.expert_backend, use) if use.widths else None
