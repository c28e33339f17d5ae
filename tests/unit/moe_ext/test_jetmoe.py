"""A small JetMoE as it is built: biases, norms, routers, initial weights."""

import logging
import math
import re
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moe_ext.attention.cache import KeyValueCache
from moe_ext.attention.core import use_cache
from moe_ext.builder import BuiltModel, build_model
from moe_ext.config import MoEModelConfig
from moe_ext.experts import EXPERT_BACKENDS
from moe_ext.experts.backends import ExpertBackend
from moe_ext.experts.layer import ExpertsLayer
from moe_ext.experts.loop import loop_experts
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "num_experts": 6,
    "moa_num_experts": 5,
    "moe_ffn_hidden_size": 16,
    "vocab_size": 64,
    "init_method_std": 0.1,
}
SEQUENCE, BATCH = 8, 2

# megatron-core 0.16's own RowParallelLinear does not hand its group on.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")


def build(groups: ProcessGroupCollection, seed: int = 1, **changes: Any) -> BuiltModel:
    model = MoEModelConfig(**{**PRESETS["jetmoe_8b"], **SIZES, **changes})
    assert model.problems() == []
    config = transformer_config(model, bf16=False)
    return build_model(model, config, pg_collection=groups, seq_length=SEQUENCE, seed=seed)


def losses(built: BuiltModel) -> Tensor:
    """[b, s] of fixed tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    found: Tensor = built.chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return found


def test_only_the_final_norm_has_the_final_epsilon(single_rank: ProcessGroupCollection) -> None:
    decoder = build(single_rank).chunks[0].decoder
    assert decoder.final_layernorm.eps == 1e-5
    for layer in decoder.layers:
        assert (layer.input_layernorm.eps, layer.pre_mlp_layernorm.eps) == (1e-6, 1e-6)
    plain = build(single_rank, final_norm_epsilon=None).chunks[0].decoder
    assert plain.final_layernorm.eps == 1e-6


def test_weights_start_with_the_stated_deviation_and_biases_at_zero(
    single_rank: ProcessGroupCollection,
) -> None:
    chunk = build(single_rank).chunks[0]
    attention = chunk.decoder.layers[0].self_attention
    assert attention.experts.weight_q.shape == (5, 16, 32)
    for weight in (
        attention.experts.weight_q,
        attention.experts.weight_o,
        attention.linear_kv.weight,
    ):
        # Three standard errors of 1,024 draws and more.
        assert weight.std().item() == pytest.approx(0.1, rel=0.07)
    # Each expert has a stream of its own, and so have the routers of a layer.
    assert not torch.equal(attention.experts.weight_q[0], attention.experts.weight_q[1])
    router = chunk.decoder.layers[0].mlp.router
    assert not torch.equal(attention.router.weight[:4], router.weight[:4])
    biases = {n: w for n, w in chunk.named_parameters() if n.endswith("bias")}
    assert len(biases) == 4
    assert not any(bias.any() for bias in biases.values())


def test_the_feed_forward_bias_is_added_once_and_no_gate_multiplies_it(
    single_rank: ProcessGroupCollection,
) -> None:
    # Gates that do not sum to 1 would show in the bias.
    layer = build(single_rank, router="softmax_topk").chunks[0].decoder.layers[0].mlp
    assert isinstance(layer, ExpertsLayer) and layer.output_bias is not None
    hidden = torch.randn(SEQUENCE, BATCH, 32, generator=torch.Generator().manual_seed(0))
    without, _ = layer(hidden)
    with torch.no_grad():
        layer.output_bias.copy_(torch.arange(32.0))
    output, bias = layer(hidden)
    assert bias is None
    # fp32 at a magnitude of 31.
    torch.testing.assert_close(
        output - without, layer.output_bias.expand_as(output), atol=1e-5, rtol=0
    )
    (gradient,) = torch.autograd.grad(output.sum(), layer.output_bias)
    assert torch.equal(gradient, torch.full((32,), float(SEQUENCE * BATCH)))


def test_zero_routers_have_a_balance_of_one_and_a_z_loss_of_ln_e_squared(
    single_rank: ProcessGroupCollection,
) -> None:
    built = build(single_rank)
    with torch.no_grad():
        for name, weight in built.chunks[0].named_parameters():
            if name.endswith("router.weight"):
                weight.zero_()
    losses(built)
    reports = {kind: metrics.reduce() for kind, metrics in built.metrics.items()}
    assert reports.keys() == {"moe", "moa"}
    for kind, experts in (("moe", 6), ("moa", 5)):
        report = reports[kind]
        # fp32 sums over 16 tokens.
        assert report.layer_load_balancing_loss == pytest.approx([1.0, 1.0], rel=1e-6)
        assert report.layer_z_loss == pytest.approx([math.log(experts) ** 2] * 2, rel=1e-6)
        assert report.load.shape == (2, experts)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, {"moe", "moa"}),
        ({"attention": "standard", "moa_num_experts": None}, {"moe"}),
        ({"num_experts": None, "ffn_hidden_size": 24, "moe_output_bias": False}, {"moa"}),
        (
            {
                "num_experts": None,
                "ffn_hidden_size": 24,
                "moe_output_bias": False,
                "attention": "standard",
                "moa_num_experts": None,
            },
            set(),
        ),
    ],
)
def test_each_kind_of_router_has_metrics_and_every_parameter_a_gradient(
    single_rank: ProcessGroupCollection, changes: dict[str, Any], kinds: set[str]
) -> None:
    built = build(single_rank, **changes)
    assert built.metrics.keys() == kinds
    losses(built).mean().backward()
    for name, weight in built.chunks[0].named_parameters():
        assert weight.grad is not None and weight.grad.any(), name
    for metrics in built.metrics.values():
        assert not any(map(math.isnan, metrics.reduce().layer_z_loss))


def test_moa_serves_a_model_that_is_not_jetmoe_otherwise(
    single_rank: ProcessGroupCollection,
) -> None:
    tiny = {**PRESETS["olmoe_tiny"], "attention": "moa", "moa_router_topk": 2, "kv_channels": 8}
    changes = {**tiny, "num_query_groups": 2, "num_layers": 1, "moe_output_bias": False}
    built = build(single_rank, **{**changes, "vocab_size": 64, "moa_num_experts": 3})
    losses(built).mean().backward()
    assert built.metrics["moa"].reduce().load.shape == (1, 3)
    assert built.metrics["moe"].reduce().load.shape == (1, 64)


def test_megatron_core_knows_every_block(
    single_rank: ProcessGroupCollection, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns of feed-forward classes that it does not know, and hands them no groups."""
    with caplog.at_level(logging.WARNING):
        build(single_rank)
    assert not [record for record in caplog.records if "MLP" in record.getMessage()]


def test_a_backend_without_projection_is_refused_for_moa_alone(
    single_rank: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERT_BACKENDS, "feed_forward", ExpertBackend(experts=loop_experts))
    build(single_rank, expert_backend="feed_forward", attention="standard", moa_num_experts=None)
    message = "expert_backend 'feed_forward' has no projection, which moa attention is made of"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(single_rank, expert_backend="feed_forward")


def test_logits_from_kept_keys_and_values_are_those_of_the_whole_sequence(
    single_rank: ProcessGroupCollection,
) -> None:
    """Three tokens at once, then one at a time; a new token chooses experts by itself."""
    model = build(single_rank).chunks[0].eval()
    tokens = torch.randint(64, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    cache = KeyValueCache(batch_size=BATCH, capacity=SEQUENCE)
    parts = []
    with torch.no_grad():
        whole = model(tokens, positions, None)  # [b, s, v]
        with use_cache(model, cache):
            for start, end in [(0, 3), *((i, i + 1) for i in range(3, SEQUENCE))]:
                cache.place(positions[:, start:end])
                parts.append(model(tokens[:, start:end], positions[:, start:end], None))
    # fp32 through two layers.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
