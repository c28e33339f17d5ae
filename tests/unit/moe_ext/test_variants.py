"""Every variant of the architecture against the same model as plain loops, in float64."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.init import weight_shards
from moe_ext.layers.transformer import transformer_config
from tests.unit.moe_ext.plain_model import plain_loss

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_experts": 5,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 7,
    "vocab_size": 37,
    "make_vocab_size_divisible_by": 8,
    "init_method_std": 0.3,
    "moe_aux_loss_coeff": 0.3,
    "moe_z_loss_coeff": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_qk_norm": {"attention": "standard"},
    "layer_norm": {"normalization": "NonParametricLayerNorm", "final_norm_epsilon": 1e-2},
    "whole_normal": {"init_method_cutoff": None},
    "interleaved": {"moe_layer_freq": 2, "ffn_hidden_size": 11},
    "every_third": {"moe_layer_freq": 3, "ffn_hidden_size": 11, "attention": "standard"},
    "shared_by_layers": {"moe_share_across_layers": True},
    "shared_by_every_second_layer": {
        **{"moe_share_across_layers": True, "moe_layer_freq": 2, "ffn_hidden_size": 11},
        "moe_shared_expert_intermediate_size": 9,
    },
    "shared_expert": {"moe_shared_expert_intermediate_size": 9},
}


LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_stages": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
    "seq_length": 8,
}


def test_a_shared_expert_is_split_over_tensor_parallel_ranks() -> None:
    model = MoEModelConfig(moe_shared_expert_intermediate_size=15)
    assert model.layout_problems(**{**LAYOUT, "tensor_model_parallel_size": 2}) == [
        "moe_shared_expert_intermediate_size (15) must be a multiple of tensor_model_parallel_size"
        " (2); use tensor_model_parallel_size 1, 3, 5 or 15"
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_what_plain_loops_do(
    name: str, single_rank: ProcessGroupCollection
) -> None:
    model = MoEModelConfig(**{**SMALL, **VARIANTS[name]})
    assert not model.problems()
    config = transformer_config(model, bf16=False)
    built = build_model(model, config, pg_collection=single_rank, seq_length=6, seed=3)
    chunk = built.chunks[0].double()
    for parameter in chunk.parameters():
        if parameter.dim() == 1:  # or norms would all multiply by 1
            parameter.data += 0.1 * torch.arange(parameter.numel()).sin()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, dtype=torch.float64))
    tokens = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
    weights = {
        key: value.detach().clone().requires_grad_() for key, value in chunk.named_parameters()
    }
    plain = plain_loss(weights, model, tokens)
    plain.backward()
    losses = chunk(tokens[:, :-1], torch.arange(6)[None], labels=tokens[:, 1:])
    losses.mean().backward()
    report = next(iter(built.metrics.values())).reduce()
    auxiliary = (
        model.moe_aux_loss_coeff * report.load_balancing_loss
        + model.moe_z_loss_coeff * report.z_loss / model.moe_router_topk
    )
    assert losses.mean().item() + auxiliary == pytest.approx(plain.item(), rel=1e-7)
    for key, parameter in chunk.named_parameters():
        expected = weights[key].grad
        assert expected is not None and expected.any(), key
        difference = torch.linalg.vector_norm(parameter.grad - expected)
        assert difference <= 1e-6 * torch.linalg.vector_norm(expected), key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "shared_by_layers",
            {
                "decoder.mlp.router.weight": [5, 12],
                "decoder.mlp.experts.weight1": [5, 2, 7, 12],
                "decoder.mlp.experts.weight2": [5, 12, 7],
            },
        ),
        (
            "interleaved",
            {
                f"decoder.layers.{layer}.mlp.{part}": shape
                for layers, parts in (
                    ((0, 2), {"linear_fc1.weight": [22, 12], "linear_fc2.weight": [12, 11]}),
                    (
                        (1, 3),
                        {
                            "router.weight": [5, 12],
                            "experts.weight1": [5, 2, 7, 12],
                            "experts.weight2": [5, 12, 7],
                        },
                    ),
                )
                for layer in layers
                for part, shape in parts.items()
            },
        ),
    ],
)
def test_feed_forwards_have_these_names_in_a_checkpoint(
    name: str, expected: dict[str, list[int]], single_rank: ProcessGroupCollection
) -> None:
    model = MoEModelConfig(**{**SMALL, **VARIANTS[name]})
    config = transformer_config(model, bf16=False)
    built = build_model(model, config, pg_collection=single_rank, seq_length=6, seed=3)
    found = [shard for shard in weight_shards(list(built.chunks)) if ".mlp." in shard.key]
    assert {shard.key: list(shard.global_shape) for shard in found} == expected
    held = sum(shard.data.numel() for shard in found if shard.data is not None)
    assert held == sum(
        value.numel() for key, value in built.chunks[0].named_parameters() if ".mlp." in key
    )


def test_layers_that_share_are_not_split_over_a_pipeline() -> None:
    model = MoEModelConfig(moe_share_across_layers=True)
    (problem,) = model.layout_problems(**{**LAYOUT, "pipeline_model_parallel_size": 2})
    assert problem.startswith("moe_share_across_layers (True) has one feed-forward for all layers")
