"""Compare presets with published sizes, and check that every preset is valid."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.functional import layer_coefficients
from moe_ext.presets import PRESETS


def preset(name: str) -> MoEModelConfig:
    return MoEModelConfig(**PRESETS[name])


def test_olmoe_has_the_published_parameters() -> None:
    count = count_parameters(preset("olmoe_1b_7b"))
    assert count.total == 6_919_161_856
    assert count.active == 1_282_017_280


def test_dense_comparator_matches_active_parameters_of_olmoe() -> None:
    dense = count_parameters(preset("olmoe_1b_7b_dense"))
    assert dense.total == dense.active == 1_279_854_592
    assert dense.active / count_parameters(preset("olmoe_1b_7b")).active == pytest.approx(
        1, abs=0.002
    )


def test_dense_comparator_differs_only_as_the_paper_says() -> None:
    moe, dense = (dataclasses.asdict(preset(f"olmoe_1b_7b{end}")) for end in ("", "_dense"))
    different = {key for key in moe if moe[key] != dense[key]}
    assert different == {"num_experts", "ffn_hidden_size", "attention"}
    assert dense["ffn_hidden_size"] == moe["moe_router_topk"] * moe["moe_ffn_hidden_size"]


def test_olmoe_flops_are_6n_plus_attention_scores() -> None:
    """Count 6 x 1.179e9 without the embedding, plus 12 L h s, as the published 205 TFLOP/s do."""
    multiplied = 1_282_017_280 - 50_304 * 2048
    expected = 6 * multiplied + 12 * 16 * 2048 * 4096
    assert training_flops_per_token(preset("olmoe_1b_7b"), 4096) == expected


def test_olmoe_loss_coefficients_per_layer_match_the_training_code() -> None:
    model = preset("olmoe_1b_7b")
    coefficients = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=model.num_layers,
        topk=model.moe_router_topk,
    )
    assert coefficients == pytest.approx((6.25e-4, 7.8125e-6), rel=1e-12)


def test_olmoe_vocabulary_has_the_published_rows() -> None:
    model = preset("olmoe_1b_7b")
    assert (model.vocab_size, model.padded_vocab_size) == (50_304, 50_304)


def test_jetmoe_has_the_published_parameters() -> None:
    count = count_parameters(preset("jetmoe_8b"))
    assert count.total == 8_522_237_952
    assert count.active == 2_331_445_248


def test_jetmoe_flops_are_6n_plus_attention_scores() -> None:
    """Count the tied matrix once, and attention of 2 x 16 heads of 128."""
    expected = 6 * 2_331_445_248 + 12 * 24 * 2 * 16 * 128 * 4096
    assert training_flops_per_token(preset("jetmoe_8b"), 4096) == expected


def test_jetmoe_loss_coefficients_per_router_are_the_published_ones() -> None:
    model = preset("jetmoe_8b")
    coefficients = layer_coefficients(
        model.moe_loss_convention,
        model.moe_aux_loss_coeff,
        model.moe_z_loss_coeff,
        num_layers=model.num_layers,
        topk=model.moe_router_topk,
    )
    assert coefficients == (0.01, 0.001)


def test_jetmoe_matches_transformers() -> None:
    """Compare parameters, heads and epsilons, built without storage."""
    model = preset("jetmoe_8b")
    fields: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "num_experts_per_tok": model.moe_router_topk,
        "intermediate_size": model.moe_ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_local_experts": model.num_experts,
        "rms_norm_eps": model.final_norm_epsilon,
        "tie_word_embeddings": True,
    }
    config = transformers.JetMoeConfig(**fields)
    with torch.device("meta"):
        reference = transformers.JetMoeForCausalLM(config)
    count = count_parameters(model)
    assert sum(weight.numel() for weight in reference.parameters()) == count.total
    assert config.num_attention_heads == model.num_attention_heads
    assert reference.model.norm.variance_epsilon == model.final_norm_epsilon
    assert reference.model.layers[0].input_layernorm.variance_epsilon == model.norm_epsilon


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid(name: str) -> None:
    assert preset(name).problems() == []


@pytest.mark.parametrize(
    ("name", "inherited"),
    [
        *[
            (name, {"num_query_groups", "kv_channels", "moe_output_bias", "final_norm_epsilon"})
            for name in ("olmoe_1b_7b", "olmoe_tiny")
        ],
        ("jetmoe_8b", set()),
        ("jetmoe_tiny", set()),
    ],
)
def test_preset_sets_every_field_that_shapes_the_model(name: str, inherited: set[str]) -> None:
    """Protect published models from later changes of defaults."""
    runtime = {"expert_backend", "fused_kernels", "moe_token_dispatcher_type"}
    runtime |= {"moe_router_dtype"}
    derived = {"ffn_hidden_size", "moa_num_experts", "moa_router_topk"}  # None
    fields = {field.name for field in dataclasses.fields(MoEModelConfig)}
    assert fields - runtime - derived - inherited == PRESETS[name].keys()
