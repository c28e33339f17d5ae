"""Sequences spread over context parallel ranks train like whole ones, documents packed or not."""

import pytest
import torch

from tests.distributed.launcher import Outcome, flags, run_cases

CP2: dict[str, object] = {"context-parallel-size": 2}
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
PP2: dict[str, object] = {"pipeline-model-parallel-size": 2}
EP2: dict[str, object] = {"expert-model-parallel-size": 2}
# A small vocabulary, so that many of the random tokens end a document.
DOCUMENTS: dict[str, object] = {
    "vocab-size": 9,
    "eod-token-id": 4,
    "reset-position-ids": True,
    "reset-attention-mask": True,
}
MASKED = {**DOCUMENTS, "packed-attention": "mask"}
"""The truth of the others, whose documents are kept apart without a mask."""
PACKED = {"vocab-size": 9}
JETMOE: dict[str, object] = {
    "attention": "moa",
    "router": "topk_softmax",
    "num-attention-heads": 12,
    "num-query-groups": 4,
    "kv-channels": 10,
    "moe-output-bias": True,
    "no-untie-embeddings-and-output-weights": True,
    "moe-loss-convention": "per_layer",
}
TWO_RANKS: dict[str, tuple[str, dict[str, object]]] = {
    "cp2": ("plain", CP2),
    "cp2_ep2": ("plain", {**CP2, **EP2}),
    "cp2_distributed_optimizer": ("plain", {**CP2, "use-distributed-optimizer": True}),
    "cp2_recompute_full": ("plain", {**CP2, "recompute-granularity": "full"}),
    "cp2_recompute_attention": (
        "plain",
        {**CP2, "recompute-granularity": "selective", "recompute-modules": "core_attn"},
    ),
    "cp2_documents": ("documents", {**CP2, **DOCUMENTS}),
    "tp2_documents": ("documents", {**TP2, **DOCUMENTS}),
    "dp2_documents_recompute": (
        "documents",
        {**DOCUMENTS, "recompute-granularity": "full"},
    ),
    "jetmoe_cp2": ("jetmoe", {**JETMOE, **CP2}),
    "jetmoe_cp2_documents": ("jetmoe_documents", {**JETMOE, **CP2, **DOCUMENTS}),
    "jetmoe_pp2_documents": ("jetmoe_documents", {**JETMOE, **PP2, **DOCUMENTS}),
}
FOUR_RANKS: dict[str, tuple[str, dict[str, object]]] = {
    "cp4": ("plain", {"context-parallel-size": 4}),
    "pp2_cp2": ("plain", {**PP2, **CP2}),
    "cp2_ep2_dp2_documents": ("documents", {**CP2, **EP2, **DOCUMENTS}),
    "tp2_cp2_documents": ("documents", {**TP2, **CP2, **DOCUMENTS}),
    "jetmoe_tp2_cp2": ("jetmoe", {**JETMOE, **TP2, **CP2}),
}
# fp32 sums in another order: 1e-5 on losses, 1e-4 on the gradient norm, relative.
TOLERANCES = {"lm_loss": 1e-5, "load_balancing_loss": 1e-5, "z_loss": 1e-5, "grad_norm": 1e-4}


STEPS = 2


def short(**overrides: object) -> list[str]:
    return flags(**{"train-iters": STEPS, "num-layers": 2, "global-batch-size": 4, **overrides})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("context")
    single = {"plain": short(), "documents": short(**MASKED), "together": short(**PACKED)}
    single |= {"jetmoe": short(**JETMOE), "jetmoe_documents": short(**JETMOE, **MASKED)}
    two = {name: short(**case) for name, (_, case) in TWO_RANKS.items()}
    four = {name: short(**case) for name, (_, case) in FOUR_RANKS.items()}
    return {
        **run_cases(1, single, out / "1"),
        **run_cases(2, two, out / "2"),
        **run_cases(4, four, out / "4"),
    }


@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_layout_trains_like_a_single_process(name: str, outcomes: dict[str, Outcome]) -> None:
    found = outcomes[name]
    truth = outcomes[{**TWO_RANKS, **FOUR_RANKS}[name][0]]
    assert found.error is None, found.error
    for key, tolerance in TOLERANCES.items():
        expected = truth.series(key)
        assert len(expected) == STEPS
        assert found.series(key) == pytest.approx(expected, rel=tolerance), key
    assert found.series("valid_loss")[0] == pytest.approx(truth.series("valid_loss")[0], rel=1e-5)
    assert found.weights.keys() == truth.weights.keys()
    for key, weight in truth.weights.items():
        difference = torch.linalg.vector_norm((found.weights[key] - weight).double())
        assert difference <= 1e-4 * torch.linalg.vector_norm(weight.double()), key


def test_keeping_documents_apart_matters(outcomes: dict[str, Outcome]) -> None:
    """The comparison above means nothing if the boundaries did."""
    apart, together = outcomes["documents"], outcomes["together"]
    assert apart.series("lm_loss")[0] != pytest.approx(together.series("lm_loss")[0], rel=1e-5)
