"""Compare predicted memory with parameter counts, simulated schedules and an allocator."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.plan_rank import largest_growth
from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from moe_ext.config import MoEModelConfig
from moe_ext.cost.activations import Step, StepRank, bytes_by_part, layer, micro_batch
from moe_ext.cost.footprint import footprint, in_flight, model_state, stage_footprint
from moe_ext.cost.workspace import expert_workspace
from moe_ext.counting import count_parameters
from moe_ext.experts.grouped_gemm import grouped_gemm_routed_experts
from moe_ext.experts.slots import sort_by_expert
from moe_ext.presets import PRESETS

OLMOE = MoEModelConfig(**PRESETS["olmoe_1b_7b"])
JETMOE = MoEModelConfig(**PRESETS["jetmoe_8b"])
DENSE = MoEModelConfig(**PRESETS["olmoe_1b_7b_dense"])


def layout_of(num_ranks: int, **sizes: int) -> Layout:
    fields = {"expert_tensor_parallel_size": 1}
    fields |= {f"{name}_parallel_size": size for name, size in sizes.items() if name != "virtual"}
    parallel = ParallelConfig(
        num_virtual_stages_per_pipeline_rank=sizes.get("virtual", 1),
        **fields,  # type: ignore[arg-type]
    )
    return resolve_layout(parallel, num_ranks)


def step_of(**changes: Any) -> Step:
    fields = {"seq_length": 512, "micro_batch_size": 1, "num_microbatches": 8, **changes}
    return Step(**fields)


def rank_of(model: MoEModelConfig, layout: Layout, stage: int = 0, **changes: Any) -> StepRank:
    return StepRank(model=model, layout=layout, batch=step_of(**changes), stage=stage)


@pytest.mark.parametrize("model", [OLMOE, JETMOE, DENSE])
def test_one_rank_holds_the_state_of_all_parameters(model: MoEModelConfig) -> None:
    total = count_parameters(model).total
    state = model_state(rank_of(model, layout_of(1)))
    assert (state.weights, state.gradients, state.optimizer) == (2 * total, 4 * total, 12 * total)
    exact = model_state(rank_of(model, layout_of(1), bf16=False))
    assert (exact.weights, exact.gradients, exact.optimizer) == (4 * total, 4 * total, 8 * total)


def test_sharded_optimizer_state_sums_to_one_copy_over_ranks() -> None:
    layout = layout_of(16, expert_model=8)
    state = model_state(rank_of(OLMOE, layout, use_distributed_optimizer=True))
    whole = model_state(rank_of(OLMOE, layout))
    assert 16 * state.optimizer == pytest.approx(12 * count_parameters(OLMOE).total, rel=1e-5)
    assert state.optimizer < whole.optimizer / 2
    assert state.gradients == pytest.approx(whole.gradients, rel=1e-5)


def test_stage_weights_sum_to_the_model() -> None:
    layout = layout_of(4, pipeline_model=4)
    ranks = [model_state(rank_of(OLMOE, layout, stage=stage)) for stage in range(4)]
    assert sum(state.weights for state in ranks) == 2 * count_parameters(OLMOE).total
    tied = [model_state(rank_of(JETMOE, layout, stage=stage)).weights for stage in range(4)]
    copy = 2 * JETMOE.padded_vocab_size * JETMOE.hidden_size
    assert sum(tied) == 2 * count_parameters(JETMOE).total + copy


def test_1f1b_keeps_one_micro_batch_for_each_later_stage() -> None:
    layout = layout_of(4, pipeline_model=4)
    found = [in_flight(layout, 8, stage=stage) for stage in range(4)]
    assert found == [[Counter({0: 4})], [Counter({0: 3})], [Counter({0: 2})], [Counter({0: 1})]]
    assert in_flight(layout, 2, stage=0) == [Counter({0: 2})]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(2, 2, 4), (4, 2, 8), (2, 3, 2)]
)
def test_interleaved_schedule_matches_a_simulated_one(
    pipeline: int, virtual: int, micro_batches: int
) -> None:
    layout = layout_of(pipeline, pipeline_model=pipeline, virtual=virtual)
    groups = micro_batches // pipeline
    forward = [chunk for _ in range(groups) for chunk in range(virtual) for _ in range(pipeline)]
    backward = [virtual - 1 - chunk for chunk in forward]
    for stage in range(pipeline):
        ahead = min((pipeline - stage - 1) * 2 + (virtual - 1) * pipeline, len(forward))
        waiting, seen = list(forward[:ahead]), []
        for index, chunk in enumerate(forward[ahead:]):
            waiting.append(chunk)
            seen.append(Counter(waiting))
            waiting.remove(backward[index])
        found = in_flight(layout, micro_batches, stage=stage)
        assert all(+counts in [+each for each in found] for counts in seen or [Counter(waiting)])
        assert max(map(Counter.total, found)) == min(ahead + 1, len(forward))


def test_devices_differ_only_in_norm_activations() -> None:
    parts = {
        device: bytes_by_part(layer(rank_of(OLMOE, layout_of(1), device_type=device)))
        for device in ("cpu", "cuda")
    }
    norms = {device: found.pop("norms") for device, found in parts.items()}
    assert parts["cpu"] == parts["cuda"]
    # The inputs of two norms of h, of queries and of keys: fp32 where a GPU has bf16.
    assert norms["cpu"] - norms["cuda"] == 512 * 4 * OLMOE.hidden_size * 2


def test_kept_bytes_scale_with_tokens_and_layers() -> None:
    one = rank_of(OLMOE, layout_of(1))
    (chunk,) = one.chunks
    kept = micro_batch(one, chunk)
    twice = micro_batch(rank_of(OLMOE, layout_of(1), seq_length=1024), chunk)
    fixed = 4 * OLMOE.padded_vocab_size * OLMOE.hidden_size + 16 * (65 * 4 + 64 * 8)
    assert twice - fixed == 2 * (kept - fixed)
    by_context = rank_of(OLMOE, layout_of(2, context=2))
    assert micro_batch(by_context, chunk) == pytest.approx((kept + fixed) / 2, rel=0.05)


def test_imbalance_adds_rows_to_the_busiest_rank_only() -> None:
    even, busy = (
        rank_of(OLMOE, layout_of(8, expert_model=8), imbalance=imbalance)
        for imbalance in (1.0, 1.5)
    )
    rows = 512 * 8
    row = 2 * (OLMOE.hidden_size + 2 * OLMOE.moe_ffn_hidden_size) + 4
    difference = sum(bytes_by_part(layer(busy)).values()) - sum(bytes_by_part(layer(even)).values())
    assert difference == 0.5 * rows * row
    balanced, skewed = (
        bytes_by_part(layer(rank_of(OLMOE, layout_of(8), imbalance=imbalance)))
        for imbalance in (1, 1.5)
    )
    assert balanced == skewed


@pytest.mark.parametrize(
    ("model", "changes", "moment"),
    [
        (OLMOE, {"seq_length": 16, "device_type": "cpu"}, "optimizer"),
        (OLMOE, {"seq_length": 4096}, "layer backward"),
        (DENSE, {"seq_length": 512}, "head forward"),
    ],
)
def test_peak_is_the_moment_with_the_most_memory(
    model: MoEModelConfig, changes: dict[str, Any], moment: str
) -> None:
    found = footprint(model, layout_of(1), step_of(**changes))
    assert found.moment == moment
    assert found.peak == found.state.total + found.activations + found.workspace


def test_footprint_is_that_of_the_largest_stage() -> None:
    layout = layout_of(4, pipeline_model=4)
    stages = [stage_footprint(OLMOE, layout, step_of(), stage=stage) for stage in range(4)]
    worst = footprint(OLMOE, layout, step_of())
    assert worst.peak == max(each.peak for each in stages)
    assert len({each.peak for each in stages}) == 4


def test_recomputation_lowers_the_peak_in_order() -> None:
    def peak(**changes: Any) -> float:
        step = step_of(seq_length=4096, micro_batch_size=4, **changes)
        return footprint(OLMOE, layout_of(8, expert_model=8), step).peak

    full, moe = peak(recompute="full"), peak(recompute="moe")
    block = peak(recompute="full", recompute_method="block", recompute_num_layers=8)
    attention = peak(recompute_core_attention=True)
    assert full < moe < block < attention < peak()


@pytest.mark.parametrize(("tokens", "experts"), [(2048, 4), (512, 32)])
def test_grouped_gemm_workspace_matches_the_allocator(tokens: int, experts: int) -> None:
    """Compare in bf16 buffers, because a CPU would convert what is added to fp32 ones."""
    width, ffn, topk = 256, 128, 4
    model = dataclasses.replace(
        OLMOE,
        hidden_size=width,
        num_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=ffn,
    )
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_()
    weight1 = torch.randn(experts, 2, ffn, width, dtype=torch.bfloat16).requires_grad_()
    weight2 = torch.randn(experts, width, ffn, dtype=torch.bfloat16).requires_grad_()
    for weight in (weight1, weight2):
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    gates = torch.rand(tokens, topk).requires_grad_()
    order = sort_by_expert(torch.rand(tokens, experts).topk(topk).indices, num_experts=experts)
    output = grouped_gemm_routed_experts(hidden, weight1, weight2, order, gates)
    upstream = torch.randn_like(output)
    found = largest_growth(lambda: output.backward(upstream))
    predicted = expert_workspace(rank_of(model, layout_of(1), seq_length=tokens))
    # It does convert a product of bf16 and fp32.
    assert found == pytest.approx(predicted, rel=0.12)
