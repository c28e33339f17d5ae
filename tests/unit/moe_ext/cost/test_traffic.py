"""Compare predicted traffic with built models, simulations and sums by hand.

Real runs of several ranks are compared in tests/distributed/test_traffic.py.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.cost.cluster import TERMS, Cluster, collective_seconds, ranks_on_node, step_seconds
from moe_ext.cost.collective import Collective, Kind, make_collective
from moe_ext.cost.device import H200, flat
from moe_ext.cost.param_shards import Shard, bucket_sizes, model_chunks
from moe_ext.cost.rank import Batch
from moe_ext.cost.traffic import step_collectives
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.layers.transformer import transformer_config
from moe_ext.presets import PRESETS

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "num_experts": 6,
    "moe_router_topk": 3,
    "moe_ffn_hidden_size": 20,
    "vocab_size": 120,
}
MODELS: dict[str, MoEModelConfig] = {
    "olmoe": MoEModelConfig(**SIZES),
    "plain": MoEModelConfig(**{**SIZES, "attention": "standard"}),
    "dense": MoEModelConfig(**{**SIZES, "num_experts": None, "ffn_hidden_size": 40}),
    "jetmoe": MoEModelConfig(
        **{
            **SIZES,
            "attention": "moa",
            "kv_channels": 10,
            "moa_num_experts": 5,
            "moe_output_bias": True,
            "untie_embeddings_and_output_weights": False,
        }
    ),
}
OLMOE = MoEModelConfig(**PRESETS["olmoe_1b_7b"])


def layout(world_size: int, **sizes: Any) -> Layout:
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    fields = {names.get(name, name): size for name, size in sizes.items()}
    return resolve_layout(ParallelConfig(**fields), world_size)


def batch(**changes: Any) -> Batch:
    fields = {"seq_length": 16, "micro_batch_size": 2, "num_microbatches": 3, **changes}
    return Batch(**fields)


def moved(collectives: list[Collective], *purposes: str) -> float:
    return sum(each.step_bytes for each in collectives if each.purpose in purposes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [{}, {"use_distributed_optimizer": True}])
def test_single_rank_exchanges_nothing(name: str, shards: dict[str, bool]) -> None:
    assert step_collectives(MODELS[name], layout(1), batch(**shards)) == []


@pytest.mark.parametrize("name", MODELS)
def test_parameters_match_a_built_model_in_order(
    name: str, single_rank: ProcessGroupCollection
) -> None:
    model = MODELS[name]
    built = build_model(
        model,
        transformer_config(model, bf16=False),
        pg_collection=single_rank,
        seq_length=16,
        seed=None,
    )
    (chunk,) = model_chunks(model, layout(1), 0)
    found = [
        (weight.numel(), not getattr(weight, "allreduce", True))
        for weight in built.chunks[0].parameters()
    ]
    assert [(shard.numel, shard.is_expert) for shard in chunk.shards] == found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "etp": 1}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"pp": 2, "ep": 2}]
)
def test_shards_of_all_ranks_sum_to_the_model(name: str, sizes: dict[str, int]) -> None:
    model = MODELS[name]
    if model.num_experts is None and "ep" in sizes:
        pytest.skip("a dense model has no experts to shard")
    cut = layout(4, **sizes)
    held = 0
    for stage in range(cut.pipeline):
        for chunk in model_chunks(model, cut, stage):
            for shard in chunk.shards:
                is_copy = shard.is_split_sequence
                copies = cut.expert * cut.expert_tensor if shard.is_expert else cut.tensor
                held += shard.numel * (1 if is_copy else copies)
    expected = count_parameters(model).total
    if not model.untie_embeddings_and_output_weights and cut.pipeline > 1:
        expected += model.padded_vocab_size * model.hidden_size  # the last stage's copy
    assert held == expected


@pytest.mark.parametrize("limit", [None, 700, 10**9])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_buckets_match_megatron_core(
    limit: int | None,
    is_sharded: bool,
    is_tied: bool,
    single_rank: ProcessGroupCollection,
    make_config: Callable[..., TransformerConfig],
) -> None:
    numbers = [300, 64, 129, 500, 7, 1000, 64, 33]
    module = torch.nn.ParameterList(torch.zeros(number) for number in numbers)
    parameters = list(module)
    if is_tied:
        parameters[0].shared_embedding = True
        parameters[-1].shared_embedding = True
    wrapped = DistributedDataParallel(
        make_config(),
        DistributedDataParallelConfig(
            use_distributed_optimizer=is_sharded,
            overlap_grad_reduce=limit is not None,  # only then are there several buckets
            bucket_size=limit,
        ),
        module,
    )
    (buffer,) = wrapped.buffers
    shards = [
        Shard(name="", numel=number, is_tied=is_tied and index in (0, len(numbers) - 1))
        for index, number in enumerate(numbers)
    ]
    found = bucket_sizes(shards, num_ranks=1, is_sharded=is_sharded, limit=limit)
    assert found == [bucket.grad_data.numel() for bucket in buffer.buckets]
    assert len(found) > 1 or limit != 700


def ring_all_gather(parts: list[int]) -> list[int]:
    """Return the bytes that each rank sends when every part goes once around a ring."""
    number = len(parts)
    sent = [0] * number
    for start, size in enumerate(parts):
        for hop in range(number - 1):
            sent[(start + hop) % number] += size
    return sent


@pytest.mark.parametrize("number", [2, 3, 8])
def test_wire_bytes_match_a_simulated_ring(number: int) -> None:
    once = ring_all_gather([100] * number)[0]
    cut = layout(number)

    def wire(kind: Kind) -> float:
        return make_collective(cut, kind, "dp", 1, 100 * number, "gradients").wire_bytes

    assert wire("all_gather") == pytest.approx(once)
    assert wire("reduce_scatter") == pytest.approx(once)  # the same ring, backwards
    assert wire("all_reduce") == pytest.approx(2 * once)  # one, then the other
    assert wire("all_to_all") == pytest.approx((number - 1) * 100)  # a part to each other rank
    assert (wire("send"), wire("receive")) == (100 * number, 0)


def test_olmoe_dispatch_bytes_match_a_sum_by_hand() -> None:
    """Count 8 rows of 2,048 bf16 values and an fp32 gate; there and back, forward and backward."""
    found = step_collectives(OLMOE, layout(8, ep=8), batch(seq_length=4096))
    tokens, layers, away = 4096 * 2 * 3, 16, 7 / 8
    hidden, gates = 4 * 8 * 2048 * 2, 2 * 8 * 4
    assert moved(found, "dispatch", "combine") == tokens * layers * away * (hidden + gates)
    assert moved(found, "dispatch_sizes") == 3 * layers * 7 * 64 * 8
    assert sum(each.count for each in found if each.kind == "all_to_all") == 3 * layers * 6


def test_imbalance_scales_all_to_all_as_a_simulated_routing_does() -> None:
    """Check that a rank receives in dispatch what it sends in combine, and nothing else changes."""
    model, tokens, ranks = MODELS["olmoe"], 32, 2
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(ranks, tokens, 6, generator=generator) + torch.arange(6) / 6
    owners = scores.topk(3, dim=-1).indices // 3  # the rank of each of 3 + 3 experts
    received = torch.bincount(owners.flatten(), minlength=ranks).tolist()
    imbalance = max(received) / (tokens * 3)
    assert imbalance > 1.1
    cut = layout(2, ep=2)
    even = step_collectives(model, cut, batch(bf16=False))
    skewed = step_collectives(model, cut, batch(bf16=False, imbalance=imbalance))
    combine = [each for each in skewed if each.kind == "all_to_all" and each.purpose == "combine"]
    assert combine[0].payload_bytes == pytest.approx(max(received) * 48 * 4)
    for one, other in zip(even, skewed, strict=True):
        factor = imbalance if one.kind == "all_to_all" else 1.0
        assert other.payload_bytes == pytest.approx(factor * one.payload_bytes)


def test_micro_batches_repeat_layers_but_not_gradients() -> None:
    cut = layout(8, tp=2, pp=2, ep=2, etp=1)
    one, three = (
        step_collectives(MODELS["olmoe"], cut, batch(num_microbatches=number)) for number in (1, 3)
    )
    once = {"gradients", "parameters", "grad_norm", "loss"}
    for few, many in zip(one, three, strict=True):
        assert many.count == few.count * (1 if few.purpose in once else 3)
        assert many.payload_bytes == few.payload_bytes


def test_bf16_halves_activations_but_not_gradients_gates_or_counts() -> None:
    cut = layout(4, tp=2, ep=2)
    wide, narrow = (
        step_collectives(MODELS["olmoe"], cut, batch(bf16=bf16)) for bf16 in (False, True)
    )
    halved = {"attention", "embedding", "dispatch", "combine", "head", "qk_norm"}
    ratios: dict[str, Counter[float]] = {}
    for one, other in zip(wide, narrow, strict=True):
        ratios.setdefault(one.purpose, Counter())[other.payload_bytes / one.payload_bytes] += 1
    assert {purpose for purpose, found in ratios.items() if 0.5 in found} <= halved
    assert set(ratios["gradients"]) == set(ratios["router"]) == {1.0}
    assert set(ratios["attention"]) == set(ratios["embedding"]) == {0.5}
    # The gates stay fp32, and under ETP so does the sum over the ranks that share an expert.
    assert set(ratios["dispatch"]) == set(ratios["combine"]) == {0.5, 1.0}


def test_distributed_optimizer_moves_gradients_once_and_all_parameters_twice() -> None:
    cut = layout(4, ep=2)
    whole = step_collectives(OLMOE, cut, batch())
    sharded = step_collectives(OLMOE, cut, batch(use_distributed_optimizer=True))
    # Half of an all-reduce; padding is next to nothing at this size.
    assert moved(sharded, "gradients") == pytest.approx(moved(whole, "gradients") / 2, rel=1e-4)
    # bf16 after fp32: half the bytes, but twice.
    assert moved(sharded, "parameters") == pytest.approx(moved(sharded, "gradients"))
    dense = dataclasses.replace(OLMOE, num_experts=None, ffn_hidden_size=1024)
    once = step_collectives(dense, layout(4), batch(use_distributed_optimizer=True))
    assert moved(once, "parameters") == pytest.approx(moved(once, "gradients") / 2)


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_pipeline_sends_equal_receives(stages: int, virtual: int) -> None:
    cut = layout(4, pp=stages, num_virtual_stages_per_pipeline_rank=virtual)
    messages: Counter[str] = Counter()
    for stage in range(stages):
        for each in step_collectives(MODELS["olmoe"], cut, batch(), stage=stage):
            if each.purpose == "pipeline":
                messages[each.kind] += each.count
    # Between neighbouring chunks, forward and backward, three micro-batches.
    assert messages["send"] == messages["receive"] == 2 * 3 * (stages * virtual - 1)


def test_flex_dispatcher_is_refused() -> None:
    model = dataclasses.replace(MODELS["olmoe"], moe_token_dispatcher_type="flex")
    with pytest.raises(ValueError, match=re.escape("is 'flex', whose traffic")):
        step_collectives(model, layout(2, ep=2), batch())
    assert step_collectives(model, layout(2), batch())  # nothing to dispatch


CLUSTER = Cluster(
    device=flat(100.0), intra_bytes_per_second=8e11, inter_bytes_per_second=5e10, latency_s=0.0
)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"tp": 2, "cp": 2}, {"pp": 4}, {"ep": 4}])
def test_ranks_on_node_match_groups_enumerated_on_a_grid(
    sizes: dict[str, int],
) -> None:
    """Check rank 0's groups, its node being ranks 0 to 7 of 32."""
    cut = layout(32, **sizes)
    grid = torch.arange(32).view(cut.pipeline, cut.data, cut.context, cut.tensor)
    experts = torch.arange(32).view(cut.pipeline, cut.expert_data, cut.expert, cut.expert_tensor)
    groups: dict[Any, torch.Tensor] = {
        "tp": grid[0, 0, 0],
        "cp": grid[0, 0, :, 0],
        "tp_cp": grid[0, 0],
        "dp": grid[0, :, 0, 0],
        "dp_cp": grid[0, :, :, 0],
        "pp": grid[:, 0, 0, 0],
        "mp": grid[:, 0, 0],
        "embd": grid[[0, -1], 0, 0, 0].unique(),
        "ep": experts[0, 0, :, 0],
        "etp": experts[0, 0, 0],
        "tp_ep": experts[0, 0],
        "tp_ep_pp": experts[:, 0],
        "expt_dp": experts[0, :, 0, 0],
        "world": grid,
    }
    for group, ranks in groups.items():
        assert ranks_on_node(cut, group, 8) == int((ranks < 8).sum()), group


def test_collective_time_is_bytes_over_the_slowest_link() -> None:
    one_node, nodes = layout(8), layout(32)
    near = make_collective(one_node, "all_reduce", "dp", 1, 8e9, "gradients")
    assert collective_seconds(near, CLUSTER, one_node) == pytest.approx(14e9 / 8e11)
    # A ring over four nodes of eight leaves each through eight adapters.
    far = make_collective(nodes, "all_gather", "dp", 1, 32e9, "parameters")
    assert collective_seconds(far, CLUSTER, nodes) == pytest.approx(31e9 / (8 * 5e10))
    # Experts within a node: one replica per node, which uses one adapter.
    distributed = layout(32, ep=8)
    remote = make_collective(distributed, "all_gather", "expt_dp", 1, 4e9, "parameters")
    assert collective_seconds(remote, CLUSTER, distributed) == pytest.approx(3e9 / 5e10)
    # An all-to-all over all: 24 of 32 parts leave the node.
    wide = layout(32, ep=32)
    exchange = make_collective(wide, "all_to_all", "ep", 1, 32e6, "dispatch")
    assert collective_seconds(exchange, CLUSTER, wide) == pytest.approx(24e6 / 5e10)
    slow = dataclasses.replace(CLUSTER, latency_s=1.0)
    assert collective_seconds(near, slow, one_node) == pytest.approx(1.0175)


VECTOR_FLOPS = 6 * (16 * 4 + 1) * 2048
"""Of OLMoE's norms, which `training_flops_per_token` counts and which are no products."""


def test_single_gpu_only_computes() -> None:
    found = step_seconds(OLMOE, layout(1), batch(), CLUSTER)
    flops = (training_flops_per_token(OLMOE, 16) - VECTOR_FLOPS) * 16 * 2 * 3
    assert found["compute"] == pytest.approx(flops / 1e14)
    assert sum(found.values()) == found["compute"]
    # Recomputing a layer repeats its forward pass, a third of it; the head is not recomputed.
    again = step_seconds(OLMOE, layout(1), batch(recompute="full"), CLUSTER)
    head = 6 * 50304 * 2048 * 16 * 2 * 3
    assert again["compute"] == pytest.approx((4 * flops - head) / 3 / 1e14)


def test_every_purpose_belongs_to_one_term() -> None:
    found = step_collectives(
        MODELS["olmoe"], layout(32, tp=2, cp=2, pp=2, ep=2), batch(use_distributed_optimizer=True)
    )
    known = [purpose for purposes in TERMS.values() for purpose in purposes]
    assert len(known) == len(set(known))
    assert {each.purpose for each in found} <= set(known)
    whole = dataclasses.replace(CLUSTER, device=H200)
    seconds = step_seconds(MODELS["olmoe"], layout(32, tp=2, cp=2, pp=2, ep=2), batch(), whole)
    assert all(each > 0 for each in seconds.values())
    # One of two stages is idle for the time of one of three micro-batches.
    busy = sum(seconds[term] for term in ("compute", "dispatch", "tensor", "context"))
    assert seconds["bubble"] == pytest.approx(busy / 3)


def test_imbalanced_rank_computes_and_exchanges_more() -> None:
    cut = layout(8, ep=8)
    even, skewed = (
        step_seconds(OLMOE, cut, batch(imbalance=imbalance), CLUSTER) for imbalance in (1.0, 2.0)
    )
    experts = 6 * 16 * 8 * 3 * 2048 * 1024
    extra = experts / (training_flops_per_token(OLMOE, 16) - VECTOR_FLOPS)
    assert skewed["compute"] / even["compute"] == pytest.approx(1 + extra)
    assert skewed["dispatch"] / even["dispatch"] == pytest.approx(2, rel=1e-2)
    assert math.isclose(skewed["gradients"], even["gradients"])
