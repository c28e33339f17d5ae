"""Check what the model config refuses by itself, and its padded vocabulary."""

from typing import Any

import pytest

from moe_ext.config import MoEModelConfig

MOA: dict[str, Any] = {
    "attention": "moa",
    "moa_num_experts": 5,
    "moa_router_topk": 2,
    "num_query_groups": 3,
    "num_attention_heads": 6,
    "kv_channels": 4,
}

MODEL_RULES: list[tuple[dict[str, Any], str]] = [
    (
        {"hidden_size": 100, "num_attention_heads": 3},
        "hidden_size (100) must be a multiple of num_attention_heads (3) when kv_channels is not"
        " set; use a hidden size of 99 or 102, or set kv_channels",
    ),
    (
        {"hidden_size": 12, "num_attention_heads": 4},
        "the size of a head (hidden_size / num_attention_heads = 3) must be even, because RoPE"
        " rotates its channels in pairs; use a head size of 2 or 4",
    ),
    (
        {"kv_channels": 33},
        "the size of a head (kv_channels = 33) must be even, because RoPE rotates its channels in"
        " pairs; use a head size of 32 or 34",
    ),
    (
        {"num_query_groups": 3},
        "num_attention_heads (4) must be a multiple of num_query_groups (3); use num_query_groups"
        " 1, 2 or 4",
    ),
    (
        {"num_experts": 4},
        "moe_router_topk (8) must be at most num_experts (4); use 1 to 4 experts per token",
    ),
    (
        {"num_experts": None},
        "ffn_hidden_size (None) must be set when num_experts is None, which is a dense model; set"
        " the feed-forward width, or set num_experts",
    ),
    (
        {"moa_num_experts": 4},
        "moa_num_experts (4) is set, but attention is 'full_width_qk_norm'; set attention to 'moa',"
        " or moa_num_experts to None",
    ),
    (
        {"moa_router_topk": 4},
        "moa_router_topk (4) is set, but attention is 'full_width_qk_norm'; set attention to 'moa',"
        " or moa_router_topk to None",
    ),
    (
        {**MOA, "moa_num_experts": None, "num_experts": None, "ffn_hidden_size": 8},
        "moa_num_experts (None) must be set when attention is 'moa' and num_experts is None; set"
        " the experts of the attention, or another attention",
    ),
    (
        {**MOA, "moa_num_experts": 1},
        "the experts per token of the attention (moa_router_topk 2, moe_router_topk 8: 2) must be"
        " at most its experts (1); use a moa_router_topk of 1 to 1",
    ),
    (
        {**MOA, "moa_router_topk": None, "moe_router_topk": 4, "num_attention_heads": 2},
        "num_attention_heads (2) must be num_query_groups x the experts per token of the attention"
        " (3 x 4) when attention is 'moa', because each chosen expert brings one query head for"
        " each key/value head; use num_attention_heads 12",
    ),
    (
        {**MOA, "num_query_groups": None},
        "num_attention_heads (6) must be num_query_groups x the experts per token of the attention"
        " (6 x 2) when attention is 'moa', because each chosen expert brings one query head for"
        " each key/value head; use num_attention_heads 12",
    ),
    (
        {**MOA, "kv_channels": None, "hidden_size": 96},
        "kv_channels (None) must be set when attention is 'moa', whose heads count once for each"
        " chosen expert; set the size of a head, for example hidden_size / num_query_groups = 32",
    ),
    (
        {**MOA, "kv_channels": 5},
        "the size of a head (kv_channels = 5) must be even, because RoPE rotates its channels in"
        " pairs; use a head size of 4 or 6",
    ),
    (
        {"num_experts": None, "ffn_hidden_size": 8, "moe_output_bias": True},
        "moe_output_bias (True) needs experts, but num_experts is None; set it to False, or set"
        " num_experts",
    ),
    (
        {"num_experts": None, "ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 4},
        "moe_shared_expert_intermediate_size (4) needs experts, but num_experts is None; set it to"
        " None, or set num_experts",
    ),
    (
        {"moe_layer_freq": 5, "ffn_hidden_size": 8},
        "moe_layer_freq (5) must be at most num_layers (4), or no layer has experts; use 1 to 4, or"
        " set num_experts to None",
    ),
    (
        {"moe_layer_freq": 2},
        "ffn_hidden_size (None) must be set when moe_layer_freq (2) leaves layers dense; set their"
        " feed-forward width",
    ),
    *[
        ({name: value}, f"{name} ({value}) must be above 0; use a positive number")
        for name, value in (
            ("rotary_base", 0.0),
            ("norm_epsilon", -1e-5),
            ("final_norm_epsilon", 0.0),
            ("init_method_std", 0.0),
            ("init_method_cutoff", -3.0),
        )
    ],
    *[
        ({name: -0.1}, f"{name} (-0.1) must not be negative; use 0 to switch the loss off")
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    ],
]

MODEL_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "vocab_size"),
    *("make_vocab_size_divisible_by", "moa_num_experts", "moa_router_topk"),
    "moe_shared_expert_intermediate_size",
)


@pytest.mark.parametrize(("changes", "expected"), MODEL_RULES)
def test_each_rule_names_value_and_remedy(changes: dict[str, Any], expected: str) -> None:
    assert MoEModelConfig(**changes).problems() == [expected]


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_sizes_are_positive(name: str) -> None:
    changes: dict[str, Any] = {name: 0}
    expected = f"{name} (0) must be at least 1; use a positive number"
    assert MoEModelConfig(**changes).problems() == [expected]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 100, "num_attention_heads": 3, "kv_channels": 2},
        {"num_experts": 8, "moe_router_topk": 8},
        {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0},
        {"moe_router_topk": 64, "num_query_groups": 2},
        {"num_experts": None, "ffn_hidden_size": 256},
        MOA,
        {**MOA, "num_experts": None, "ffn_hidden_size": 256},
        {**MOA, "moa_num_experts": None, "moa_router_topk": None, "num_attention_heads": 24},
        {**MOA, "num_query_groups": None, "moa_router_topk": 1},
        {"moe_output_bias": True, "final_norm_epsilon": 1e-6},
    ],
)
def test_valid_models_have_no_problems(changes: dict[str, Any]) -> None:
    assert MoEModelConfig(**changes).problems() == []


@pytest.mark.parametrize(
    ("vocab_size", "step", "rows"),
    [(50280, 128, 50304), (50304, 128, 50304), (1, 128, 128), (7, 1, 7)],
)
def test_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, step: int, rows: int) -> None:
    model = MoEModelConfig(vocab_size=vocab_size, make_vocab_size_divisible_by=step)
    assert model.padded_vocab_size == rows
