"""Every field of the architecture is written to config.json or refused, family by family."""

import re
from dataclasses import replace
from typing import Any

import pytest

from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES, family_for_model
from tests.unit.moe_ext.convert.test_config import written

NATIVE: dict[str, Any] = {"vocab_size": 120, "make_vocab_size_divisible_by": 8}
JETMOE_NATIVE: dict[str, Any] = {
    **NATIVE,
    **{"attention": "moa", "num_query_groups": 4, "kv_channels": 32, "num_attention_heads": 32},
    **{"router": "topk_softmax", "moe_output_bias": True, "norm_epsilon": 1e-6},
}
OLMO_NATIVE: dict[str, Any] = {
    **NATIVE,
    **{"num_experts": None, "ffn_hidden_size": 64, "attention": "standard"},
    "normalization": "NonParametricLayerNorm",
}
BASES = {"olmoe": NATIVE, "jetmoe": JETMOE_NATIVE, "olmo": OLMO_NATIVE}
# Another value for every architecture field, with the fields it requires.
OF_ALL: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 5},
    "hidden_size": {"hidden_size": 256},
    "kv_channels": {"kv_channels": 64},
    "num_experts": {"num_experts": 8},
    "vocab_size": {"vocab_size": 112},
    "rotary_base": {"rotary_base": 5.0},
    "norm_epsilon": {"norm_epsilon": 1e-3},
    "final_norm_epsilon": {"final_norm_epsilon": 1e-3},
    "untie_embeddings_and_output_weights": {"untie_embeddings_and_output_weights": False},
}
OF_MIXTURES: dict[str, dict[str, Any]] = {
    **OF_ALL,
    "moe_ffn_hidden_size": {"moe_ffn_hidden_size": 32},
    "normalization": {"normalization": "NonParametricLayerNorm"},
    "moe_layer_freq": {"moe_layer_freq": 2, "ffn_hidden_size": 64},
    "moe_share_across_layers": {"moe_share_across_layers": True},
    "moe_shared_expert_intermediate_size": {"moe_shared_expert_intermediate_size": 16},
    "attention": {"attention": "standard"},
    "moe_router_enable_expert_bias": {"moe_router_enable_expert_bias": True},
}
OTHER: dict[str, dict[str, dict[str, Any]]] = {
    "olmoe": {
        **OF_MIXTURES,
        "num_attention_heads": {"num_attention_heads": 8},
        "num_query_groups": {"num_query_groups": 2},
        "ffn_hidden_size": {"num_experts": None, "ffn_hidden_size": 64},
        "moe_router_topk": {"moe_router_topk": 2},
        "moe_output_bias": {"moe_output_bias": True},
        "moa_num_experts": {**JETMOE_NATIVE, "moa_num_experts": 32},
        "moa_router_topk": {**JETMOE_NATIVE, "moa_router_topk": 4, "num_attention_heads": 16},
        "router": {"router": "topk_softmax"},
    },
    "jetmoe": {
        **OF_MIXTURES,
        "num_attention_heads": {"num_attention_heads": 64, "num_query_groups": 8},
        "num_query_groups": {"num_attention_heads": 64, "num_query_groups": 8},
        "ffn_hidden_size": {
            **{"num_experts": None, "ffn_hidden_size": 64, "moe_output_bias": False},
            "moa_num_experts": 64,
        },
        "moe_router_topk": {"moe_router_topk": 2, "num_attention_heads": 8},
        "moe_output_bias": {"moe_output_bias": False},
        "moa_num_experts": {"moa_num_experts": 32},
        "moa_router_topk": {"moa_router_topk": 4, "num_attention_heads": 16},
        "router": {"router": "softmax_topk"},
    },
    "olmo": {
        **OF_ALL,
        "num_attention_heads": {"num_attention_heads": 8},
        "num_query_groups": {"num_query_groups": 2},
        "ffn_hidden_size": {"ffn_hidden_size": 32},
        "normalization": {"normalization": "RMSNorm"},
        "attention": {"attention": "full_width_qk_norm"},
    },
}
OF_EXPERTS = {name for name in OTHER["olmoe"] if name.startswith(("moe_", "moa_", "router"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_field_is_written_or_refused(family: str) -> None:
    """Fail when a new field is added without deciding here how it converts."""
    base = MoEModelConfig(**BASES[family])
    assert FAMILIES[family].problems(base) == []
    known = {*OTHER[family], "make_vocab_size_divisible_by"}  # rows that are stripped
    known |= OF_EXPERTS if base.num_experts is None else set()
    assert known == base.architecture().keys()
    for field, changes in OTHER[family].items():
        model = replace(base, **changes)
        assert model.problems() == [], field
        if not FAMILIES[family].problems(model):
            assert written(family, model) != written(family, base), field


INEXPRESSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": None, "ffn_hidden_size": 64}, "olmoe: num_experts is None, a dense model"),
    ({"attention": "standard"}, "olmoe: attention is 'standard', and OLMoE's is"),
    ({"kv_channels": 64}, "olmoe: kv_channels is 64, and OLMoE's is hidden_size /"),
    ({"router": "mine"}, "olmoe: router is 'mine', and OLMoE's is 'softmax_topk'"),
    ({"moe_output_bias": True}, "olmoe: moe_output_bias is True, and OLMoE has no bias"),
    ({"final_norm_epsilon": 0.5}, "olmoe: final_norm_epsilon is 0.5, and OLMoE's is norm_epsilon"),
    (
        {"moe_shared_expert_intermediate_size": 16},
        "olmoe: moe_shared_expert_intermediate_size is 16, and the family has no shared expert",
    ),
    (
        {**JETMOE_NATIVE, "moe_shared_expert_intermediate_size": 16},
        "jetmoe: moe_shared_expert_intermediate_size is 16, and the family has no shared expert",
    ),
    (
        {"normalization": "NonParametricLayerNorm"},
        "olmoe: normalization is NonParametricLayerNorm, and the family has RMSNorm",
    ),
    (
        {"moe_layer_freq": 2, "ffn_hidden_size": 64},
        "olmoe: moe_layer_freq is 2, and the family has experts in every layer",
    ),
    (
        {"moe_share_across_layers": True},
        "olmoe: moe_share_across_layers is True, and the family has other experts in every layer",
    ),
    ({"moe_router_enable_expert_bias": True}, "olmoe: moe_router_enable_expert_bias is True"),
    ({"num_experts": None, "ffn_hidden_size": 64}, "olmo: normalization is 'RMSNorm', and OLMo's"),
    ({**OLMO_NATIVE, "norm_epsilon": 1e-6}, "olmo: norm_epsilon is 1e-06, and OLMo's is 1e-05"),
    (OLMO_NATIVE, ""),
    ({"num_layers": 3}, ""),
    ({**JETMOE_NATIVE, "norm_epsilon": 1e-5}, "jetmoe: norm_epsilon is 1e-05, and transformers"),
    ({**JETMOE_NATIVE, "moe_output_bias": False}, "jetmoe: moe_output_bias is False"),
    ({**JETMOE_NATIVE, "router": "softmax_topk"}, "jetmoe: router is 'softmax_topk'"),
    ({**JETMOE_NATIVE, "moa_num_experts": 9}, "jetmoe: moa_num_experts is 9, and JetMoE's is num_"),
    ({**JETMOE_NATIVE, "moa_router_topk": 4}, "jetmoe: moa_router_topk is 4, and JetMoE's is moe_"),
    (JETMOE_NATIVE, ""),
]


@pytest.mark.parametrize(("fields", "message"), INEXPRESSIBLE)
def test_inexpressible_model_is_refused_naming_the_field(
    fields: dict[str, Any], message: str
) -> None:
    model = MoEModelConfig(**{**NATIVE, **fields})
    if not message:
        name = {"moa": "jetmoe", "standard": "olmo"}.get(fields.get("attention", ""), "olmoe")
        assert family_for_model(model) is FAMILIES[name]
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        family_for_model(model)
    name = message.partition(":")[0]
    with pytest.raises(ValueError, match=f"{name} cannot express this model"):
        written(name, model)
    with pytest.raises(ValueError, match=f"{name} cannot express this model"):
        FAMILIES[name].pieces(model, FAMILIES[name].layouts[-1])
