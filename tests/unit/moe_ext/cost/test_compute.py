"""Compare predicted times with FLOPs counted elsewhere, measured steps and sums by hand."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.calibrate import calibrate, predict_ms
from benchmarks.shapes import SHAPES
from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from moe_ext.config import MoEModelConfig
from moe_ext.cost.cluster import Cluster, step_seconds
from moe_ext.cost.compute import micro_batch_seconds, update_seconds
from moe_ext.cost.device import DEVICES, H200, LAYER_FLOPS, Device, find_device, flat
from moe_ext.cost.param_shards import model_chunks
from moe_ext.cost.rank import Batch, Rank
from moe_ext.counting import count_parameters, training_flops_per_token
from moe_ext.presets import PRESETS

OLMOE = MoEModelConfig(**PRESETS["olmoe_1b_7b"])
JETMOE = MoEModelConfig(**PRESETS["jetmoe_8b"])
DENSE = MoEModelConfig(**PRESETS["olmoe_1b_7b_dense"])
SHARED = dataclasses.replace(OLMOE, moe_shared_expert_intermediate_size=1024)


def layout(world_size: int, **sizes: int) -> Layout:
    fields: dict[str, Any] = {f"{name}_parallel_size": size for name, size in sizes.items()}
    return resolve_layout(
        ParallelConfig(**{"expert_tensor_parallel_size": 1, **fields}), world_size
    )


def batch(**changes: Any) -> Batch:
    fields = {"seq_length": 4096, "micro_batch_size": 4, "num_microbatches": 1, **changes}
    return Batch(**fields)


def rank(model: MoEModelConfig, cut: Layout, stage: int = 0, **changes: Any) -> Rank:
    return Rank(model=model, layout=cut, batch=batch(**changes), stage=stage)


def cluster(device: Device) -> Cluster:
    return Cluster(device=device, intra_bytes_per_second=4.5e11, inter_bytes_per_second=5e10)


def backend(model: MoEModelConfig, name: str, **changes: Any) -> MoEModelConfig:
    return dataclasses.replace(model, expert_backend=name, **changes)


def product_flops(model: MoEModelConfig, seq_length: int) -> float:
    """Return the FLOPs of a token without those of vectors, which are no products."""
    (chunk,) = model_chunks(model, layout(1), 0)
    vectors = [each.numel for each in chunk.shards if re.search("norm|bias", each.name)]
    return training_flops_per_token(model, seq_length) - 6 * sum(vectors)


@pytest.mark.parametrize("model", [OLMOE, JETMOE, DENSE, SHARED])
@pytest.mark.parametrize("sizes", [{}, {"tensor_model": 2}, {"pipeline_model": 2}, {"context": 2}])
def test_products_of_all_ranks_are_the_flops_of_a_step(
    model: MoEModelConfig, sizes: dict[str, int]
) -> None:
    cut = layout(2, **sizes)
    stages = [rank(model, cut, stage) for stage in range(cut.pipeline)]
    found = sum(micro_batch_seconds(each, flat(1.0)).total * 1e12 for each in stages)
    shared = cut.tensor * cut.context
    expected = product_flops(model, 4096) * 4 * 4096
    assert found * shared == pytest.approx(expected)


@pytest.mark.parametrize(
    ("layers", "name", "sequences", "micro_batches", "measured_ms"),
    [
        (2, "grouped", 4, 1, 99.8),
        (2, "triton", 4, 1, 85.5),
        # 69,202 and 28,600 tokens a second.
        (8, "grouped", 4, 2, 8 * 4096 / 69.202),
        (16, "grouped", 1, 16, 16 * 4096 / 28.600),
    ],
)
def test_whole_steps_measured_on_an_h200(
    layers: int, name: str, sequences: int, micro_batches: int, measured_ms: float
) -> None:
    """Of OLMoE-1B-7B with fewer layers: docs/performance.md, docs/planning.md."""
    step = batch(micro_batch_size=sequences, num_microbatches=micro_batches)
    model = backend(OLMOE, name, num_layers=layers)
    found = step_seconds(model, layout(1), step, cluster(H200))
    assert 1e3 * sum(found.values()) == pytest.approx(measured_ms, rel=0.07)


@pytest.mark.parametrize("name", ["triton", "grouped", "megablocks"])
def test_the_measured_layer_takes_what_was_measured(name: str) -> None:
    """A second layer adds it, beside the same attention and the same weights."""
    device = dataclasses.replace(H200, attention_tflops=1e9, gemm_tflops=1e9)
    model = backend(OLMOE, name)
    layers = micro_batch_seconds(rank(model, layout(1)), device).layers / 16
    moved = 40 * 16384 * 2048 * 2
    assert 1e3 * (layers - moved / (H200.memory_gbps * 1e9)) == pytest.approx(
        H200.layer_ms[name], rel=1e-3
    )


def test_an_h100_computes_like_an_h200_and_moves_less() -> None:
    h100 = DEVICES["h100"]
    assert (h100.gemm_tflops, h100.expert_tflops) == (H200.gemm_tflops, H200.expert_tflops)
    products = LAYER_FLOPS / H200.expert_tflops / 1e9
    for name, took in H200.layer_ms.items():
        assert h100.layer_ms[name] - products == pytest.approx((took - products) * 4.8 / 3.35)
    assert h100.expert_passes("grouped") == pytest.approx(H200.expert_passes("grouped"))


def per_token(model: MoEModelConfig, cut: Layout, **changes: Any) -> float:
    """Return the seconds of layers for a token, over the ranks that share it."""
    found = rank(model, cut, **changes)
    return micro_batch_seconds(found, H200).layers * cut.tensor / found.tokens


def test_fewer_rows_and_smaller_matrices_are_slower() -> None:
    rates = [per_token(OLMOE, layout(1), micro_batch_size=size) for size in (4, 2, 1)]
    assert rates == sorted(rates) and rates[2] > 1.02 * rates[0]
    split = [per_token(OLMOE, layout(8, tensor_model=size)) for size in (1, 2, 4, 8)]
    assert split == sorted(split) and split[3] > 1.1 * split[0]
    shared = [layout(8, tensor_model=8, expert_tensor=size) for size in (1, 8)]
    assert per_token(OLMOE, shared[0]) < per_token(OLMOE, shared[1])
    # A quarter of the tokens, but every weight's gradient is added all the same.
    whole, quarter = (
        micro_batch_seconds(rank(OLMOE, layout(1), micro_batch_size=size), H200).accumulation
        for size in (4, 1)
    )
    assert whole == quarter == count_parameters(OLMOE).total * 24 / (H200.memory_gbps * 1e9)


def test_optimizer_updates_what_a_rank_owns() -> None:
    cut = layout(16, expert_model=8)
    whole = update_seconds(rank(OLMOE, layout(1)), H200)
    assert whole == pytest.approx(count_parameters(OLMOE).total * 46 / (H200.memory_gbps * 1e9))
    shard = update_seconds(rank(OLMOE, cut, use_distributed_optimizer=True), H200)
    assert 16 * shard == pytest.approx(whole)
    assert update_seconds(rank(OLMOE, cut), H200) > whole / 8


def test_reduction_hides_under_backward_but_for_the_last_buckets() -> None:
    cut = layout(64)
    plain, hidden = (
        step_seconds(OLMOE, cut, batch(overlap_grad_reduce=each), cluster(H200))
        for each in (False, True)
    )
    # An all-reduce over eight nodes leaves each through eight adapters of 50 GB/s.
    every = 2 * 63 / 64 * 4 * count_parameters(OLMOE).total / 4e11
    assert plain["gradients"] == pytest.approx(every, rel=1e-3)
    # The last buckets end past 64 million elements, with the first layers' weights.
    assert 2 * 4 * 64e6 / 4e11 < hidden["gradients"] < 0.25 * every
    assert {**plain, "gradients": 0} == {**hidden, "gradients": 0}
    # A backward pass that is shorter hides less.
    quick = cluster(flat(1e6))
    left = step_seconds(OLMOE, cut, batch(overlap_grad_reduce=True), quick)["gradients"]
    assert left == pytest.approx(plain["gradients"], rel=0.01)


def test_weights_move_once_and_hide_under_forward_but_for_the_first_bucket() -> None:
    cut = layout(64)
    sharded = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    plain, hidden = (
        step_seconds(OLMOE, cut, batch(**sharded, overlap_param_gather=each), cluster(H200))
        for each in (False, True)
    )
    once = 63 / 64 * 2 * count_parameters(OLMOE).total / 4e11
    gained = plain["gradients"] - hidden["gradients"]
    # The first bucket, which begins past 64 million elements, is waited for.
    assert 1.75 * once < gained < 2 * once - 2 * 64e6 / 4e11
    assert {**plain, "gradients": 0} == {**hidden, "gradients": 0}
    # A forward pass that is shorter hides less.
    quick = cluster(flat(1e6))
    left = [
        step_seconds(OLMOE, cut, batch(**sharded, overlap_param_gather=each), quick)["gradients"]
        for each in (False, True)
    ]
    # One gather less, and the latency of its calls: one in 40 million elements or more.
    calls = 2e-5 * count_parameters(OLMOE).total / 40e6
    assert once < left[0] - left[1] < once + calls


def test_last_stage_has_the_head_and_waits_only_for_layers() -> None:
    cut = layout(4, pipeline_model=4)
    first, last = (
        step_seconds(OLMOE, cut, batch(num_microbatches=8), cluster(flat(100.0)), stage=stage)
        for stage in (0, 3)
    )
    head = 6 * 50304 * 2048 * 16384 * 8 / 1e14
    assert last["compute"] - first["compute"] == pytest.approx(head)
    assert last["bubble"] == pytest.approx(first["bubble"])
    assert first["bubble"] == pytest.approx(first["compute"] * 3 / 8)


def test_auto_is_the_fastest_of_those_it_chooses_from() -> None:
    assert H200.backend("auto") == "triton"
    assert dataclasses.replace(H200, layer_ms={"megablocks": 1.0}).backend("auto") == "grouped"
    assert H200.backend("te") == "grouped"
    assert H200.backend("megablocks") == "megablocks"


def test_a_file_gives_the_gpu_that_was_written(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(dataclasses.asdict(H200)))
    assert find_device(str(file)) == H200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemm_tflops": -1}, "gemm_tflops (-1) must be a number above 0"),
        ({"memory_gbps": "fast"}, "memory_gbps ('fast') must be a number"),
        ({"layer_ms": {"triton": 0}}, "layer_ms of triton (0) must be a number above 0"),
        ({"layer_ms": [3]}, "layer_ms ([3]) must map backends to milliseconds"),
        ({"name": 4}, "name (4) must be text"),
        ({"speed": 4}, "has unknown fields ['speed'] and lacks []"),
    ],
)
def test_a_wrong_file_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**dataclasses.asdict(H200), **changes}))
    with pytest.raises(ValueError, match=re.escape(message)):
        find_device(str(file))


def test_an_unknown_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("gpu 'h300' is neither a known GPU nor a file")):
        find_device("h300")
    (tmp_path / "broken").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        find_device(str(tmp_path / "broken"))


def test_calibration_finds_the_rates_that_made_the_measurements() -> None:
    truth = dataclasses.replace(
        H200,
        gemm_tflops=390.0,
        expert_tflops=H200.expert_tflops / 2,
        attention_tflops=H200.attention_tflops / 2,
        memory_gbps=2000.0,
        waits_ms=12.0,
        layer_ms={"triton": 25.0, "grouped": 31.0, "megablocks": 28.0},
    )
    common = {
        "machine": {"gpu": "a GPU", "gpu_memory_bytes": 96e9, "date": "today"},
        "tokens_per_sample": 16384,
        "native_backend": "triton",
        "ceilings": {
            "gemm_flops_per_second": {"median": 390e12},
            "copy_bytes_per_second": {"median": 2000e9},
        },
    }
    sizes = {"num_layers": 3, "seq_length": None, "micro_batch_size": None}
    arguments = {"shape": "olmoe", "device": "cuda", "dtype": "bf16", **sizes}
    shape = dataclasses.replace(
        SHAPES["olmoe"], model=dataclasses.replace(SHAPES["olmoe"].model, num_layers=3)
    )

    def file(times: dict[str, float]) -> dict[str, Any]:
        rows = {
            name: {"status": "measured", "milliseconds": {"median": took}}
            for name, took in times.items()
        }
        failed = {"scattermoe": {"status": "measured", "milliseconds": {"median": 1.0}}}
        return {**common, "arguments": arguments, "implementations": {**rows, **failed}}

    layer = file({"native": 25.0, "native:grouped": 31.0, "megablocks-grouped": 28.0})
    step = file(
        {
            "native": predict_ms(shape, "triton", truth),
            "native:grouped": predict_ms(shape, "grouped", truth),
        }
    )
    found = calibrate(layer, step, base=H200)
    assert found.layer_ms == truth.layer_ms
    assert (found.name, found.memory_gb) == ("a GPU", 96.0)
    rates = ("gemm_tflops", "expert_tflops", "attention_tflops", "memory_gbps", "waits_ms")
    assert [getattr(found, name) for name in rates] == pytest.approx(
        [getattr(truth, name) for name in rates]
    )
    with pytest.raises(ValueError, match="--dtype was fp32; measure with bf16"):
        calibrate({**layer, "arguments": {**arguments, "dtype": "fp32"}}, step, base=H200)
