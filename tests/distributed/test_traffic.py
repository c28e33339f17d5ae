"""Compare `moe_ext.cost.traffic` with every collective of real training steps on gloo.

A worker's router balances the routing, so that all-to-alls can be compared byte by byte on every
rank. One case routes by learned weights; there a rank sends what its tokens chose, and the sum over
the ranks is compared.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron.trainer.config.parallel_layout import num_microbatches, resolve_layout
from moe_app.pretrain.config import parse_recipe
from moe_ext.cost.rank import Batch
from moe_ext.cost.records import record_collectives
from moe_ext.cost.traffic import Collective, step_collectives
from tests.distributed import jetmoe_cases
from tests.distributed.launcher import HERE, flags, ranks

Calls = Counter[tuple[str, str, float]]
"""Kind, group and payload bytes."""

Case = dict[str, object]

TP2: Case = {"tensor-model-parallel-size": 2}
PP2: Case = {"pipeline-model-parallel-size": 2}
EP2: Case = {"expert-model-parallel-size": 2}
CP2: Case = {"context-parallel-size": 2}
ETP1: Case = {"expert-tensor-parallel-size": 1}
VIRTUAL: Case = {"num-virtual-stages-per-pipeline-rank": 2, "num-layers": 4}
ALLGATHER: Case = {"moe-token-dispatcher-type": "allgather"}
SHARDED: Case = {"use-distributed-optimizer": True}
OVERLAP: Case = {"overlap-grad-reduce": True}
GATHER: Case = {**SHARDED, **OVERLAP, "overlap-param-gather": True}
BF16: Case = {"bf16": True}
FULL: Case = {"recompute-granularity": "full"}
SELECTIVE: Case = {"recompute-granularity": "selective"}
NO_SP: Case = {"no-sequence-parallel": True}
LEARNED: Case = {"router": "softmax_topk"}
DENSE: Case = {"num-experts": "None", "ffn-hidden-size": 40, "attention": "standard"}
JETMOE: Case = {**jetmoe_cases.JETMOE, "router": "round_robin"}
SHARED_EXPERT: Case = {"moe-shared-expert-intermediate-size": 18}
MOA_DENSE: Case = {**JETMOE, **DENSE, "attention": "moa", "moe-output-bias": False}

CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp2": {},
        "dp2_sharded": SHARDED,
        "dp2_overlap": OVERLAP,
        "ep2_gather": {**EP2, **GATHER},
        "ep2": EP2,
        "ep2_bf16": {**EP2, **BF16},
        "ep2_allgather": {**EP2, **ALLGATHER},
        "ep2_recompute_moe": {**EP2, **SELECTIVE},
        "ep2_learned": {**EP2, **LEARNED},
        "tp2": TP2,
        "tp2_bf16": {**TP2, **BF16},
        "tp2_recompute_full": {**TP2, **FULL},
        "pp2": PP2,
        "pp2_interleaved": {**PP2, **VIRTUAL},
        "cp2": CP2,
        "dense_tp2": {**DENSE, **TP2},
        "layer_norm_tp2": {"normalization": "NonParametricLayerNorm", **TP2},
        "shared_expert_tp2_moe": {**SHARED_EXPERT, **TP2, **SELECTIVE},
        "jetmoe_tp2": {**JETMOE, **TP2},
        "moa_dense_tp2_no_sp": {**MOA_DENSE, **TP2, **NO_SP},
    },
    4: {
        "tp2_ep2_etp1": {**TP2, **EP2, **ETP1, **SHARDED},
        "tp2_ep2_etp2": {**TP2, **EP2},
        "tp2_ep2_etp2_allgather": {**TP2, **EP2, **ALLGATHER},
        "tp2_cp2": {**TP2, **CP2},
        "pp2_ep2": {**PP2, **EP2},
        "ep2_dp2_sharded_bf16": {**EP2, **SHARDED, **BF16},
        "jetmoe_pp2_dp2_sharded": {**JETMOE, **PP2, **SHARDED},
        "jetmoe_pp2_dp2_interleaved_gather": {**JETMOE, **PP2, **VIRTUAL, **GATHER},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return where the ranks have written, by their number."""
    found = {num_ranks: tmp_path_factory.mktemp(f"ranks{num_ranks}") for num_ranks in CASES}
    for num_ranks, out in found.items():
        run_ranks(num_ranks, out)
    return found


@pytest.fixture(scope="module")
def recorded(folders: dict[int, Path]) -> dict[str, list[Calls]]:
    """Return the calls of each rank, by number of ranks and case."""
    return {
        f"{num_ranks}:{name}": [
            read_calls(out / f"{name}.rank{rank}.json") for rank in range(num_ranks)
        ]
        for num_ranks, out in folders.items()
        for name in CASES[num_ranks]
    }


def run_ranks(num_ranks: int, out: Path) -> None:
    cases = CASES[num_ranks]
    listing = [{"name": name, "flags": case_flags(cases[name], num_ranks)} for name in cases]
    (out / "cases.json").write_text(json.dumps(listing))
    script = HERE / "worker_traffic.py"
    done = ranks(num_ranks, script, str(out / "cases.json"), str(out), timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


def case_flags(case: Case, num_ranks: int) -> list[str]:
    small = {"router": "round_robin", "num-layers": 2, "global-batch-size": 2 * num_ranks}
    return flags(**{**small, **case})


def read_calls(file: Path) -> Calls:
    rows = json.loads(file.read_text())
    return Counter({(kind, group, size): number for kind, group, size, number in rows})


def predicted(case: Case, num_ranks: int) -> list[list[Collective]]:
    """Return the collectives predicted for each rank."""
    cfg = parse_recipe(case_flags(case, num_ranks), prog="test", description="")
    layout = resolve_layout(cfg.parallel, num_ranks)
    granularity = cfg.training.recompute_granularity
    batch = Batch(
        seq_length=cfg.training.seq_length,
        micro_batch_size=cfg.training.micro_batch_size,
        num_microbatches=num_microbatches(cfg.training, layout),
        bf16=cfg.training.bf16,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        overlap_param_gather=cfg.parallel.overlap_param_gather,
        recompute="moe" if granularity == "selective" else granularity,
        device_type="cpu",
    )
    per_stage = num_ranks // layout.pipeline
    return [
        [
            *step_collectives(cfg.model, layout, batch, stage=rank // per_stage),
            *record_collectives(cfg.model, layout),
        ]
        for rank in range(num_ranks)
    ]


def count_calls(collectives: list[Collective]) -> Calls:
    """Count the calls that gloo makes for these collectives.

    gloo has no reduce-scatter of unequal parts; in `cpu_backend` the ranks that share an expert
    exchange the parts instead, which moves the same bytes.
    """
    calls: Calls = Counter()
    for each in collectives:
        is_exchange = each.group == "etp" and each.kind == "reduce_scatter"
        kind = "all_to_all" if is_exchange else each.kind
        calls[kind, each.group, each.payload_bytes] += each.count
    return calls


NAMES = [(num_ranks, name) for num_ranks, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(ranks, name) for ranks, name in NAMES if "learned" not in name]
)
def test_every_call_of_every_rank_is_predicted(
    num_ranks: int, name: str, recorded: dict[str, list[Calls]]
) -> None:
    expected = predicted(CASES[num_ranks][name], num_ranks)
    for found, wanted in zip(recorded[f"{num_ranks}:{name}"], expected, strict=True):
        assert found == count_calls(wanted)
        assert len(found) >= 3


def test_learned_routing_sends_the_same_total_as_balanced_routing(
    recorded: dict[str, list[Calls]],
) -> None:
    learned, balanced = recorded["2:ep2_learned"], recorded["2:ep2"]

    def exchanged(ranks: list[Calls]) -> tuple[int, float]:
        calls = [
            (size, number)
            for rank in ranks
            for (kind, _, size), number in rank.items()
            if kind == "all_to_all"
        ]
        return sum(number for _, number in calls), sum(size * number for size, number in calls)

    def others(rank: Calls) -> Calls:
        return Counter({call: number for call, number in rank.items() if call[0] != "all_to_all"})

    assert exchanged(learned) == exchanged(balanced)
    assert [others(rank) for rank in learned] == [others(rank) for rank in balanced]
    assert learned[0] != learned[1]  # or the routing would have been balanced


@pytest.mark.parametrize("name", [f"{num_ranks}:{name}" for num_ranks, name in NAMES])
def test_norm_is_megatron_cores_and_the_host_waits_once(
    name: str, folders: dict[int, Path]
) -> None:
    """Where tokens are dispatched it has to wait for megatron-core's dispatcher, too."""
    num_ranks, case = name.split(":")
    norms = []
    for rank in range(int(num_ranks)):
        file = folders[int(num_ranks)] / f"{case}.tail.rank{rank}.json"
        tail = json.loads(file.read_text())
        assert tail["norms"][0] == tail["norms"][1]
        norms.append(tail["norms"][0])
        reads = {
            site: number
            for site, number in tail["reads"].items()
            if "megatron/core/transformer/moe/" not in site
        }
        assert reads == {"megatron/trainer/step.py _measure": 1}
    # Replicas sum the same numbers.
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-6)
