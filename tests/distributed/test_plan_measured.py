"""Compare `moe_ext.cost.footprint` with the memory of real training steps on gloo.

Weights, gradients, optimizer state and kept activations are compared byte by byte, on every rank of
every case. A worker's router balances the routing; where it is learned, the sum over ranks is
compared. A larger run is compared with the resident memory that the system reports.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import plan
from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from moe_app.planner.search import make_step
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.cost.activations import Step, StepRank, micro_batch
from moe_ext.cost.footprint import in_flight, model_state
from tests.distributed import jetmoe_cases
from tests.distributed.launcher import HERE, flags, ranks

Case = dict[str, object]

TP2: Case = {"tensor-model-parallel-size": 2}
PP2: Case = {"pipeline-model-parallel-size": 2}
EP2: Case = {"expert-model-parallel-size": 2}
CP2: Case = {"context-parallel-size": 2}
ETP1: Case = {"expert-tensor-parallel-size": 1}
FOUR_LAYERS: Case = {"num-layers": 4}
VIRTUAL: Case = {**FOUR_LAYERS, "num-virtual-stages-per-pipeline-rank": 2}
ALLGATHER: Case = {"moe-token-dispatcher-type": "allgather"}
SHARDED: Case = {"use-distributed-optimizer": True}
OVERLAP: Case = {"overlap-grad-reduce": True}
BF16: Case = {"bf16": True}
FULL: Case = {"recompute-granularity": "full"}
BLOCK: Case = {
    **FOUR_LAYERS,
    **FULL,
    "recompute-method": "block",
    "recompute-num-layers": 3,
}
MOE: Case = {"recompute-granularity": "selective"}
CORE: Case = {**MOE, "recompute-modules": "core_attn"}
VARLEN: Case = {"reset-attention-mask": True, "eod-token-id": 3}
MASK: Case = {**VARLEN, "packed-attention": "mask"}
ROWS: Case = {"reset-position-ids": True, "eod-token-id": 3}
ONE: Case = {"micro-batch-size": 1}
LEARNED: Case = {"router": "softmax_topk"}
DENSE: Case = {"num-experts": "None", "ffn-hidden-size": 40, "attention": "standard"}
LAYER_NORM: Case = {"normalization": "NonParametricLayerNorm"}
SHARED_EXPERT: Case = {"moe-shared-expert-intermediate-size": 18}
JETMOE: Case = jetmoe_cases.JETMOE

CASES: dict[int, dict[str, Case]] = {
    1: {
        "plain": LEARNED,
        "one_bf16": {**LEARNED, **ONE, **BF16},
        "rows_bf16": {**ROWS, **BF16},
        "mask": MASK,
        "mask_full": {**MASK, **FULL},
        "varlen_bf16": {**VARLEN, **BF16},
        "fp32_router": {**BF16, "moe-router-dtype": "fp32"},
        "loop": {"expert-backend": "loop"},
        "full": {**FOUR_LAYERS, **FULL, "recompute-num-layers": 2},
        "block_bf16": {**BLOCK, **BF16},
        "moe": MOE,
        "core": CORE,
        "dense_bf16": {**DENSE, **BF16},
        "layer_norm_bf16": {**LAYER_NORM, **BF16},
        "shared_expert_bf16": {**SHARED_EXPERT, **BF16},
        "jetmoe": JETMOE,
        "jetmoe_loop": {**JETMOE, "expert-backend": "loop"},
        "jetmoe_core_bf16": {**JETMOE, **CORE, **BF16},
        "sharded": SHARDED,
    },
    2: {
        "dp2_sharded_bf16": {**SHARDED, **BF16},
        "ep2_bf16": {**EP2, **BF16},
        "ep2_moe": {**EP2, **MOE},
        "ep2_allgather": {**EP2, **ALLGATHER},
        "ep2_learned": {**EP2, **LEARNED},
        "tp2": TP2,
        "tp2_etp1_bf16": {**TP2, **ETP1, **BF16},
        "tp2_dense": {**TP2, **DENSE},
        "tp2_layer_norm": {**TP2, **LAYER_NORM},
        "tp2_shared_expert": {**TP2, **SHARED_EXPERT},
        "tp2_jetmoe": {**TP2, **JETMOE},
        "cp2_bf16": {**CP2, **BF16},
        "cp2_mask": {**CP2, **MASK},
        "cp2_jetmoe": {**CP2, **JETMOE},
        "pp2_bf16": {**FOUR_LAYERS, **PP2, **BF16},
        "pp2_jetmoe_sharded": {**PP2, **JETMOE, **SHARDED},
        "pp2_interleaved": {**PP2, **VIRTUAL},
    },
    4: {
        "tp2_ep2_etp1": {**TP2, **EP2, **ETP1, **SHARDED, **OVERLAP},
        "tp2_ep2_etp2_bf16": {**TP2, **EP2, **BF16},
        "pp4_few": {
            **FOUR_LAYERS,
            **{"pipeline-model-parallel-size": 4, "global-batch-size": 6},
        },
        "pp2_interleaved_ep2_sharded_bf16": {**PP2, **VIRTUAL, **EP2, **SHARDED, **BF16},
    },
}

NAMES = [(num_ranks, name) for num_ranks, cases in CASES.items() for name in cases]
in_every_case = pytest.mark.parametrize(("num_ranks", "name"), NAMES)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank holds, by number of ranks and case."""
    found: dict[str, list[dict[str, Any]]] = {}
    for num_ranks, cases in CASES.items():
        out = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        listing = [{"name": name, "flags": case_flags(num_ranks, name)} for name in cases]
        (out / "cases.json").write_text(json.dumps(listing))
        script = HERE / "plan_worker.py"
        done = ranks(num_ranks, script, str(out / "cases.json"), str(out), timeout=400)
        assert done.returncode == 0, done.stderr[-6000:]
        for name in cases:
            files = [out / f"{name}.rank{rank}.json" for rank in range(num_ranks)]
            found[f"{num_ranks}:{name}"] = [json.loads(file.read_text()) for file in files]
    return found


def case_flags(num_ranks: int, name: str) -> list[str]:
    small = {"router": "round_robin", "num-layers": 2, "global-batch-size": 4 * num_ranks}
    return flags(**{**small, **CASES[num_ranks][name]})


@dataclass(frozen=True)
class Prediction:
    """Holds what the cost model predicts of a case."""

    cfg: PretrainConfig
    layout: Layout
    step: Step
    num_ranks: int

    def rank(self, number: int) -> StepRank:
        stage = number // (self.num_ranks // self.layout.pipeline)
        return StepRank(model=self.cfg.model, layout=self.layout, batch=self.step, stage=stage)


@functools.cache
def predict(num_ranks: int, name: str) -> Prediction:
    cfg = parse_recipe(case_flags(num_ranks, name), prog="test", description="")
    layout = resolve_layout(cfg.parallel, num_ranks)
    return Prediction(cfg, layout, make_step(cfg, layout, device_type="cpu"), num_ranks)


@in_every_case
def test_state_is_predicted_to_the_byte(
    num_ranks: int, name: str, measured: dict[str, list[dict[str, Any]]]
) -> None:
    predicted = predict(num_ranks, name)
    for number, found in enumerate(measured[f"{num_ranks}:{name}"]):
        rank = predicted.rank(number)
        state = model_state(rank)
        assert found["state"]["weights"] == state.weights
        assert found["state"]["gradients"] == state.gradients
        # Padding in a rank's shard has no optimizer state.
        used = sum(shard.numel for chunk in rank.chunks for shard in chunk.shards)
        padding = (state.gradients // 4 - used) * (12 if predicted.step.bf16 else 8)
        assert 0 <= state.optimizer - found["state"]["optimizer"] <= padding
        assert padding == 0 or predicted.step.use_distributed_optimizer


@in_every_case
def test_kept_activations_are_predicted_to_the_byte(
    num_ranks: int, name: str, measured: dict[str, list[dict[str, Any]]]
) -> None:
    predicted = predict(num_ranks, name)
    ranks = measured[f"{num_ranks}:{name}"]
    is_even = "learned" not in name
    per_stage = num_ranks // predicted.layout.pipeline
    for first in range(0, num_ranks, per_stage):
        rank = predicted.rank(first)
        each = [micro_batch(rank, chunk) for chunk in rank.chunks]
        stage = [found["passes"] for found in ranks[first : first + per_stage]]
        for passes in zip(*stage, strict=True):
            (chunk,) = {chunk for chunk, _ in passes}
            sizes = [size for _, size in passes]
            # The schedules' scalars, and what context parallelism splits unevenly.
            assert max(sizes) - min(sizes) <= (0.005 if is_even else 0.2) * each[chunk]
            most = max(sizes) if is_even else sum(sizes) / len(sizes)
            assert most == pytest.approx(each[chunk], abs=4 * predicted.cfg.model.num_layers)


@in_every_case
def test_micro_batches_in_flight_are_predicted(
    num_ranks: int, name: str, measured: dict[str, list[dict[str, Any]]]
) -> None:
    predicted = predict(num_ranks, name)
    for number, found in enumerate(measured[f"{num_ranks}:{name}"]):
        rank = predicted.rank(number)
        each = [micro_batch(rank, chunk) for chunk in rank.chunks]
        highest = max(
            sum(each[chunk] * count for chunk, count in counts.items())
            for counts in in_flight(
                predicted.layout, predicted.step.num_microbatches, stage=rank.stage
            )
        )
        tolerance = 0.2 if "learned" in name else 0.005
        assert found["highest"] == pytest.approx(highest, rel=tolerance)
        if predicted.layout.pipeline > 1 and rank.stage == 0:
            assert found["highest"] > 1.5 * max(each)


def test_memory_of_a_run_is_predicted_within_15_percent() -> None:
    case = {"expert-model-parallel-size": 2, "use-distributed-optimizer": True}
    smaller = {"num-layers": 2, "seq-length": 512, "global-batch-size": 4}
    for found in plan.measure(2, {**smaller, **case}):
        predicted = found["footprint"]
        assert predicted["state"]["weights"] == found["held"]["weights"]
        assert predicted["activations"] + predicted["workspace"] > 0.1 * predicted["peak"]
        assert predicted["peak"] == pytest.approx(found["resident"], rel=0.15)
