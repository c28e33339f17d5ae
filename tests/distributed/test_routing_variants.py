"""Variants of routing train the same model under every layout: losses, norms, weights, biases."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import Outcome, flags, run_cases

STEPS = 3
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
EP2: dict[str, object] = {"expert-model-parallel-size": 2}
PP2: dict[str, object] = {"pipeline-model-parallel-size": 2}
CP2: dict[str, object] = {"context-parallel-size": 2}
VPP2: dict[str, object] = {**PP2, "num-virtual-stages-per-pipeline-rank": 2}
SHARDED: dict[str, object] = {"use-distributed-optimizer": True}
RECOMPUTED: dict[str, object] = {"recompute-granularity": "full"}

BIAS = {
    "moe-router-enable-expert-bias": True,
    "moe-router-bias-update-rate": 0.02,
    "moe-router-load-balancing-type": "seq_aux_loss",
}
BIAS_AND_CAPACITY = {**BIAS, "moe-expert-capacity-factor": 0.8}
GLOBAL = {"moe-router-load-balancing-type": "global_aux_loss"}
# One micro-batch for each data parallel rank, so that the first one's counts are all there are.
GLOBAL_AT_ONCE = {**GLOBAL, "global-batch-size": 4}
TWO_LAYERS = {"num-layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "bias": BIAS_AND_CAPACITY,
    "choice": {**TWO_LAYERS, "router": "expert_choice", "moe-aux-loss-coeff": 0},
    "grouped": {**TWO_LAYERS, "router": "expert_choice_grouped", "moe-aux-loss-coeff": 0},
    "position": {
        **TWO_LAYERS,
        **GLOBAL,
        "moe-expert-capacity-factor": 0.8,
        "moe-token-drop-policy": "position",
    },
    "global": {**TWO_LAYERS, **GLOBAL_AT_ONCE, "micro-batch-size": 4},
    "jetmoe": {**TWO_LAYERS, **JETMOE, **BIAS},
    # One router in all layers, whose loss counts each apart, and whose biases move by all.
    "shared": {
        **{**TWO_LAYERS, **BIAS, **GLOBAL_AT_ONCE, "micro-batch-size": 4},
        "moe-share-across-layers": True,
    },
}
LAYOUTS: dict[str, dict[str, object]] = {
    "bias_tp2": TP2,
    "bias_ep2": EP2,
    "bias_pp2_interleaved": VPP2,
    "bias_dp2": {**SHARDED, **RECOMPUTED},
    "bias_cp2": CP2,
    "choice_tp2": TP2,
    "choice_ep2": {**EP2, "moe-token-dispatcher-type": "allgather"},
    "choice_pp2": PP2,
    "choice_dp2": RECOMPUTED,
    "choice_cp2": CP2,
    "grouped_tp2_ep2": {**TP2, **EP2, "expert-tensor-parallel-size": 1},
    "grouped_cp2_recomputed": {**CP2, **RECOMPUTED},
    "position_tp2": {**TP2, **RECOMPUTED},
    "position_pp2_recomputed": {**PP2, **RECOMPUTED},
    "position_cp2": CP2,
    "global_dp2": {"micro-batch-size": 2},
    "jetmoe_tp2": TP2,
    "shared_dp2_recomputed": {"micro-batch-size": 2, **RECOMPUTED},
    "shared_tp2": TP2,
}
# fp32 sums in another order, as in test_parity.
TOLERANCES = {"lm_loss": 1e-5, "load_balancing_loss": 1e-5, "z_loss": 1e-5, "grad_norm": 1e-4}
SHARES = {
    **dict.fromkeys(("bias", "position"), "moe_dropped_share"),
    **dict.fromkeys(("choice", "grouped"), "moe_unrouted_share"),
}


def short(**overrides: object) -> list[str]:
    # An epsilon above the rounding of gradients, as of the dense model in test_parity.
    own = {"train-iters": STEPS, "global-batch-size": 4, "adam-eps": 1e-6}
    return flags(**{**own, **overrides})


def variant_of(name: str) -> str:
    return name.partition("_")[0]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("variants")
    one = {name: short(**each) for name, each in VARIANTS.items()}
    two = {
        name: short(**{**VARIANTS[variant_of(name)], **layout}) for name, layout in LAYOUTS.items()
    }
    saving = {**VARIANTS["bias"], **SHARDED, "save-interval": 2}
    two["saved"] = short(**saving, save=out / "saved")
    again = {"load": out / "saved", "ckpt-step": 2}
    two["resumed"] = short(**saving, **again, save=out / "resumed")
    two["moved"] = short(**{**VARIANTS["bias"], **PP2}, **again, save=out / "moved")
    return {**run_cases(1, one, out / "1"), **run_cases(2, two, out / "2")}


def assert_same_weights(found: Outcome, truth: Outcome) -> None:
    assert found.weights.keys() == truth.weights.keys()
    for key, weight in truth.weights.items():
        difference = torch.linalg.vector_norm((found.weights[key] - weight).double())
        # As in test_parity: a wrong gradient moves a matrix by a part of its own size.
        assert difference <= 1e-4 * torch.linalg.vector_norm(weight.double()), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_variant_trains_like_a_single_process(name: str, outcomes: dict[str, Outcome]) -> None:
    found, truth = outcomes[name], outcomes[variant_of(name)]
    assert found.error is None, found.error
    for key, tolerance in TOLERANCES.items():
        expected = truth.series(key)
        assert len(expected) == STEPS
        assert found.series(key) == pytest.approx(expected, rel=tolerance), key
    share = SHARES.get(variant_of(name))
    if share is not None:
        assert share == "moe_unrouted_share" or min(truth.series(share)) > 0
        assert found.series(share) == pytest.approx(truth.series(share), rel=1e-12)
    assert_same_weights(found, truth)


@pytest.mark.parametrize("name", ["bias", "jetmoe"])
def test_biases_move_by_the_rate(name: str, outcomes: dict[str, Outcome]) -> None:
    biases = {key: weight for key, weight in outcomes[name].weights.items() if "expert_bias" in key}
    assert len(biases) == (2 if name == "jetmoe" else 1)  # each of [layers, e]
    for bias in biases.values():
        steps = bias / 0.02  # whole numbers, each up to the number of steps
        assert bias.shape[0] == (2 if name == "jetmoe" else 4) and bias.abs().max() > 0
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
        assert steps.abs().max() <= STEPS + 1e-5


def test_biases_are_saved_and_resumed(outcomes: dict[str, Outcome]) -> None:
    for key, weight in outcomes["saved"].weights.items():
        assert torch.equal(outcomes["resumed"].weights[key], weight), key
    assert outcomes["resumed"].series("lm_loss") == outcomes["saved"].series("lm_loss")[2:]
    assert_same_weights(outcomes["moved"], outcomes["saved"])


def test_experts_that_choose_are_refused_what_they_do_not_do(tmp_path: Path) -> None:
    """In one launch: a loss coefficient that would do nothing, and moa attention."""
    cases = {
        "loss": short(router="expert_choice"),
        "moa": short(**{**JETMOE, "router": "expert_choice", "moe-aux-loss-coeff": 0}),
    }
    found = run_cases(1, cases, tmp_path)
    assert "moe_aux_loss_coeff (0.1) must be 0.0 with router 'expert_choice'" in (
        found["loss"].error or ""
    )
    assert "moa attention makes k query heads of each token" in (found["moa"].error or "")
