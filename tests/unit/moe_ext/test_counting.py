"""Compare parameter counts and FLOPs with built models and sums by hand."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 20,
    "num_attention_heads": 5,
    "num_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 14,
    "vocab_size": 37,
    "make_vocab_size_divisible_by": 8,
}
MOA: dict[str, Any] = {
    "attention": "moa",
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "kv_channels": 8,
}
ODD: dict[str, dict[str, Any]] = {
    "experts": {},
    "tied": {"untie_embeddings_and_output_weights": False},
    "grouped_queries": {"num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 8},
    "no_qk_norm": {"attention": "standard"},
    "dense": {"num_experts": None, "ffn_hidden_size": 34},
    "dense_tied": {
        "num_experts": None,
        "ffn_hidden_size": 34,
        "untie_embeddings_and_output_weights": False,
        "attention": "standard",
    },
    "output_bias": {"moe_output_bias": True, "final_norm_epsilon": 1e-4},
    "moa": MOA,
    "moa_own_sizes": {
        **MOA,
        "moa_num_experts": 5,
        "moa_router_topk": 4,
        "num_attention_heads": 12,
    },
    "moa_dense": {**MOA, "num_experts": None, "ffn_hidden_size": 34, "moa_num_experts": 7},
    "one_expert": {"num_experts": 1, "moe_router_topk": 1},
    "no_norm_weights": {"normalization": "NonParametricLayerNorm"},
    "interleaved": {"moe_layer_freq": 2, "ffn_hidden_size": 34},
    "shared_by_layers": {"moe_share_across_layers": True},
    "shared_expert": {"moe_shared_expert_intermediate_size": 22},
}


def built_parameters(model: MoEModelConfig, groups: ProcessGroupCollection) -> dict[str, int]:
    """Return the sizes by name of the real model, built without storage."""
    config = transformer_config(
        model, bf16=False, use_cpu_initialization=True, perform_initialization=False
    )
    with torch.device("meta"):
        built = build_model(model, config, pg_collection=groups, seq_length=16, seed=None)
    return {name: p.numel() for name, p in built.chunks[0].named_parameters()}


@pytest.mark.parametrize("name", [*PRESETS, *ODD])
def test_counts_match_the_built_model(name: str, single_rank: ProcessGroupCollection) -> None:
    values = dict(PRESETS[name]) if name in PRESETS else {**SMALL, **ODD[name]}
    model = MoEModelConfig(**values)
    sizes = built_parameters(model, single_rank)
    count = count_parameters(model)
    assert count.total == sum(sizes.values())
    assert count.embedding == sizes["embedding.word_embeddings.weight"]
    idle = 0
    for kind, experts, topk in (
        ("mlp", model.num_experts, model.moe_router_topk),
        ("self_attention", model.attention_experts, model.attention_topk),
    ):
        held = sum(size for name, size in sizes.items() if f"{kind}.experts." in name)
        if experts is not None:
            assert held > 0
            idle += held * (experts - topk) // experts
    assert count.active == count.total - idle


def test_flops_are_three_times_those_of_the_forward_pass() -> None:
    """Count two FLOPs per multiply-add; backward costs twice the forward pass."""
    model = MoEModelConfig(**{**SMALL, **ODD["grouped_queries"], "attention": "standard"})
    h, seq_length = 20, 11
    query, key = 6 * 8, 2 * 8
    attention_products = h * (query + 2 * key) + query * h
    scores_and_use = 2 * query * seq_length
    experts_and_router = 2 * 3 * h * 14 + 6 * h
    # Norm weights count like matrices, as in "6 N" formulas.
    norms = 2 * h
    layer = attention_products + scores_and_use + experts_and_router + norms
    multiply_adds = 3 * layer + h + h * 40
    assert training_flops_per_token(model, seq_length) == 3 * 2 * multiply_adds


def test_flops_count_a_shared_expert_for_every_token() -> None:
    without, shared = (
        training_flops_per_token(MoEModelConfig(**{**SMALL, **ODD[name]}), 11)
        for name in ("experts", "shared_expert")
    )
    assert shared - without == 3 * 2 * 3 * (3 * 20 * 22)


def test_flops_count_shared_layers_as_often_as_they_are_computed() -> None:
    own, shared = (
        training_flops_per_token(MoEModelConfig(**{**SMALL, **ODD[name]}), 11)
        for name in ("experts", "shared_by_layers")
    )
    assert shared == own


def test_flops_of_moa_count_k_experts_and_all_their_heads() -> None:
    model = MoEModelConfig(**{**SMALL, **ODD["moa_own_sizes"]})
    h, seq_length, width = 20, 11, 3 * 8
    projections = 4 * 2 * h * width + 2 * h * width  # k of the experts, keys and values
    scores_and_use = 2 * 4 * width * seq_length
    attention = projections + scores_and_use + 5 * h + h  # router and bias
    feed_forward = 2 * 3 * h * 14 + 6 * h
    norms = 2 * h
    multiply_adds = 3 * (attention + feed_forward + norms) + h + h * 40
    assert training_flops_per_token(model, seq_length) == 3 * 2 * multiply_adds


@pytest.mark.parametrize("name", ["experts", "dense"])
def test_tied_embeddings_change_no_flops(name: str) -> None:
    untied = MoEModelConfig(**{**SMALL, **ODD[name]})
    tied = MoEModelConfig(
        **{**SMALL, **ODD[name], "untie_embeddings_and_output_weights": False},
    )
    assert training_flops_per_token(tied, 7) == training_flops_per_token(untied, 7)
    assert count_parameters(tied).total < count_parameters(untied).total
