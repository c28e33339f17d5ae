"""Every layout trains the same model: losses, gradient norm and weights of one process."""

from typing import Any

import pytest
import torch

from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import Outcome, flags, run_cases

TWO_RANKS: dict[str, dict[str, object]] = {
    "tp2": {"tensor-model-parallel-size": 2},
    "tp2_recompute_full": {"tensor-model-parallel-size": 2, "recompute-granularity": "full"},
    "tp2_etp1": {"tensor-model-parallel-size": 2, "expert-tensor-parallel-size": 1},
    "tp2_ep2_etp1": {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 1,
    },
    "tp2_distributed_optimizer": {
        "tensor-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "pp2": {"pipeline-model-parallel-size": 2},
    "pp2_interleaved": {
        "pipeline-model-parallel-size": 2,
        "num-virtual-stages-per-pipeline-rank": 2,
    },
    "ep2_alltoall": {"expert-model-parallel-size": 2},
    "ep2_allgather": {
        "expert-model-parallel-size": 2,
        "moe-token-dispatcher-type": "allgather",
    },
    "ep2_flex": {"expert-model-parallel-size": 2, "moe-token-dispatcher-type": "flex"},
    "ep2_distributed_optimizer": {
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "dp2": {},
    "dp2_overlap": {"overlap-grad-reduce": True},
    "dp2_distributed_optimizer": {"use-distributed-optimizer": True},
    "dp2_recompute_full": {"recompute-granularity": "full"},
    "dp2_recompute_moe": {"recompute-granularity": "selective"},
}
FOUR_RANKS: dict[str, dict[str, object]] = {
    "tp2_ep2_dp2_etp1": {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 1,
    },
    "tp2_ep2_etp2": {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 2,
    },
    "tp2_ep2_etp2_allgather": {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 2,
        "moe-token-dispatcher-type": "allgather",
    },
    "tp2_ep2_etp2_flex": {
        "tensor-model-parallel-size": 2,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 2,
        "moe-token-dispatcher-type": "flex",
    },
    "pp2_ep2": {"pipeline-model-parallel-size": 2, "expert-model-parallel-size": 2},
    "pp2_dp2_distributed_optimizer": {
        "pipeline-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
}
ONE_RANK = {"recompute_full": {"recompute-granularity": "full"}, "loop": {"expert-backend": "loop"}}
# An epsilon above the rounding of gradients: with 1e-8, one weight whose gradient is next to
# nothing moves by anything up to a learning rate, and takes later gradient norms along.
DENSE = {
    "num-experts": "None",
    "ffn-hidden-size": 40,
    "attention": "standard",
    "adam-eps": 1e-6,
}

JETMOE_LAYOUTS: dict[int, dict[str, dict[str, object]]] = {
    1: {
        "jetmoe_recompute_full": {"recompute-granularity": "full"},
        "jetmoe_recompute_moe": {"recompute-granularity": "selective"},
        "jetmoe_recompute_core_attn": {
            "recompute-granularity": "selective",
            "recompute-modules": "core_attn",
        },
        "jetmoe_loop": {"expert-backend": "loop"},
    },
    2: {
        "jetmoe_tp2": {"tensor-model-parallel-size": 2},
        "jetmoe_tp2_recompute_full": {
            "tensor-model-parallel-size": 2,
            "recompute-granularity": "full",
        },
        "jetmoe_pp2": {"pipeline-model-parallel-size": 2},
        "jetmoe_pp2_interleaved": {
            "pipeline-model-parallel-size": 2,
            "num-virtual-stages-per-pipeline-rank": 2,
        },
        "jetmoe_ep2": {"expert-model-parallel-size": 2},
        "jetmoe_cp2": {"context-parallel-size": 2},
        "jetmoe_dp2": {},
        "jetmoe_dp2_distributed_optimizer": {"use-distributed-optimizer": True},
    },
    4: {
        "jetmoe_tp2_pp2": {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2},
        "jetmoe_tp2_ep2_dp2_distributed_optimizer": {
            "tensor-model-parallel-size": 2,
            "expert-model-parallel-size": 2,
            "expert-tensor-parallel-size": 1,
            "use-distributed-optimizer": True,
        },
    },
}
SMALL_JETMOE = {**JETMOE, "global-batch-size": 4}
"""Data parallel ranks have a micro-batch each; OLMoE's cases have several there, too."""
MOA_DENSE = {
    **SMALL_JETMOE,
    "num-layers": 2,
    "num-experts": "None",
    "ffn-hidden-size": 40,
    "moe-output-bias": False,
}
"""Attention alone has experts; whole sequences on every rank are then possible under TP."""
MOA_DENSE_LAYOUTS: dict[str, dict[str, object]] = {
    "moa_dense_dp2": {},
    "moa_dense_tp2": {"tensor-model-parallel-size": 2},
    "moa_dense_tp2_whole_sequences": {
        "tensor-model-parallel-size": 2,
        "no-sequence-parallel": True,
    },
}
MOA_TOLERANCES = {"lm_loss": 1e-5, "moa_load_balancing_loss": 1e-5, "moa_z_loss": 1e-5} | {
    "grad_norm": 1e-4
}

VARIANTS: dict[str, dict[str, object]] = {
    "mixed": {
        "global-batch-size": 4,
        **{"moe-layer-freq": 2, "ffn-hidden-size": 40, "moe-shared-expert-intermediate-size": 18},
        "normalization": "NonParametricLayerNorm",
    },
    "layer_shared": {"moe-share-across-layers": True, "moe-shared-expert-intermediate-size": 18},
}
"""Variants of the architecture: an expert for all tokens, every second layer dense, norms without
weights; and one feed-forward in all layers."""
ANY_LAYOUT = ("tp2", "tp2_ep2_etp1", "ep2_distributed_optimizer", "dp2_overlap", "cp2")
MOVES = {
    "mixed_tp2": ("single", "ep2_distributed_optimizer"),
    "mixed_ep2_distributed_optimizer": ("pp2_interleaved", "tp2"),
    "layer_shared_tp2": ("single", "ep2_distributed_optimizer"),
}
"""Layouts that go on from the first step of a variant under another."""
VARIANT_LAYOUTS = {
    "mixed": (*ANY_LAYOUT, "pp2", "pp2_interleaved", "dp2_recompute_full"),
    "layer_shared": (*ANY_LAYOUT, "dp2_recompute_full", "dp2_recompute_moe"),
}

GATHER_LAYOUTS: dict[int, dict[str, dict[str, object]]] = {
    2: {
        # The third step follows an evaluation.
        "dp2": {
            **{"bf16": True, "moe-share-across-layers": True, "num-layers": 2},
            "train-iters": 3,
        },
        "jetmoe_ep2": {
            **{**JETMOE, "expert-model-parallel-size": 2, "num-layers": 2},
            "recompute-granularity": "full",
        },
    },
    4: {
        "tp2_dp2": {"tensor-model-parallel-size": 2, "expert-tensor-parallel-size": 1},
        "pp2_dp2_interleaved": {
            "pipeline-model-parallel-size": 2,
            "num-virtual-stages-per-pipeline-rank": 2,
        },
    },
}
"""Layouts whose weights are gathered in buckets of a matrix or two."""
RESUMED = ("dp2", "pp2_dp2_interleaved")

# fp32 sums in another order: 1e-5 on losses, 1e-4 on the gradient norm, relative.
TOLERANCES = {"lm_loss": 1e-5, "load_balancing_loss": 1e-5, "z_loss": 1e-5, "grad_norm": 1e-4}


STEPS = 2


def short(**overrides: object) -> list[str]:
    return flags(**{"train-iters": STEPS, **overrides})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("parity")
    single = {"single": short(), "dense": short(**DENSE)}
    single["untrained"] = short(**{"lr": 1e-30, "min-lr": 1e-30})
    single |= {name: short(**case) for name, case in ONE_RANK.items()}
    two = {name: short(**case) for name, case in TWO_RANKS.items()}
    alone: dict[str, list[str]] = {}
    for variant, case in VARIANTS.items():
        single[variant] = short(**case)
        for layout in VARIANT_LAYOUTS[variant]:
            sizes = {"context-parallel-size": 2} if layout == "cp2" else TWO_RANKS[layout]
            two[f"{variant}_{layout}"] = short(**case, **sizes)
    for name, layouts in MOVES.items():
        variant = next(each for each in VARIANTS if name.startswith(each))
        two[name] += ["--save", str(out / name), "--save-interval", "1"]
        for layout in layouts:
            paths = {"load": out / name, "ckpt-step": 1}
            sizes = {} if layout == "single" else TWO_RANKS[layout]
            cases = alone if layout == "single" else two
            cases[f"{name}_to_{layout}"] = short(**VARIANTS[variant], **sizes, **paths)
    two["dense_tp2"] = short(**DENSE, **{"tensor-model-parallel-size": 2})
    four = {name: short(**case) for name, case in FOUR_RANKS.items()}
    return {
        **run_cases(1, single, out / "1"),
        **run_cases(2, two, out / "2"),
        **run_cases(1, alone, out / "moved"),
        **run_cases(4, four, out / "4"),
    }


@pytest.fixture(scope="module")
def jetmoe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("jetmoe")
    cases = {
        ranks: {name: short(**SMALL_JETMOE, **case) for name, case in layouts.items()}
        for ranks, layouts in JETMOE_LAYOUTS.items()
    }
    cases[1]["single"] = short(**SMALL_JETMOE)
    cases[1]["untrained"] = short(**SMALL_JETMOE, **{"lr": 1e-30, "min-lr": 1e-30})
    cases[1]["moa_dense"] = short(**MOA_DENSE)
    for name, case in MOA_DENSE_LAYOUTS.items():
        cases[2][name] = short(**MOA_DENSE, **case)
    found: dict[str, Outcome] = {}
    for ranks, listing in cases.items():
        found |= run_cases(ranks, listing, out / str(ranks))
    return found


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return what runs did that gather weights under forward passes, after updates, and resumed."""
    out = tmp_path_factory.mktemp("gather")
    found: dict[str, Outcome] = {}
    for ranks, layouts in GATHER_LAYOUTS.items():
        runs: dict[str, list[str]] = {}
        for name, layout in layouts.items():
            case: dict[str, object] = {
                **{"use-distributed-optimizer": True, "overlap-grad-reduce": True},
                **{"eval-interval": 2, "save": out / name, "save-interval": 1, **layout},
            }
            runs[f"{name}_after_update"] = short(**case)
            case["overlap-param-gather"] = True
            runs[name] = short(**{**case, "save": out / f"{name}_gather"})
            load = {"save": out / f"{name}_resumed", "load": out / f"{name}_gather", "ckpt-step": 1}
            if name in RESUMED:
                runs[f"{name}_resumed"] = short(**{**case, **load})
        found |= run_cases(ranks, runs, out / str(ranks), bucket_size=500)
    return found


@pytest.mark.parametrize("name", [name for layouts in GATHER_LAYOUTS.values() for name in layouts])
def test_weights_gathered_under_the_forward_pass_are_the_same(
    name: str, gathered: dict[str, Outcome]
) -> None:
    """Bit for bit; no forward pass is between the first step and its checkpoint."""
    truth = gathered[f"{name}_after_update"]
    losses = truth.series("lm_loss")
    assert len(set(losses)) == len(losses) >= STEPS
    assert truth.series("valid_loss")
    runs = [(gathered[name], 0)]
    runs += [(gathered[f"{name}_resumed"], 1)] if name in RESUMED else []
    for found, first in runs:
        assert found.error is None, found.error
        assert found.series("valid_loss") == truth.series("valid_loss")
        for key in TOLERANCES:
            assert found.series(key) == truth.series(key)[first:], key
        assert found.weights.keys() == truth.weights.keys()
        for key, weight in truth.weights.items():
            assert torch.equal(found.weights[key], weight), key


def compare(found: Outcome, truth: Outcome, keys: list[str], *, first: int = 0) -> None:
    """Compare what a run recorded, and from step `first` on what another did; final weights too."""
    assert found.error is None, found.error
    tolerances = TOLERANCES | MOA_TOLERANCES
    for key in keys:
        expected = truth.series(key)[first:]
        assert len(expected) == STEPS - first
        assert found.series(key) == pytest.approx(expected, rel=tolerances[key]), key
    evaluations: list[Any] = truth.series("valid_loss")
    assert len(evaluations) == 1
    for evaluated, wanted in zip(found.series("valid_loss"), evaluations, strict=True):
        assert evaluated == pytest.approx(wanted, rel=TOLERANCES["lm_loss"])
    assert found.weights.keys() == truth.weights.keys()
    for key, weight in truth.weights.items():
        difference = torch.linalg.vector_norm((found.weights[key] - weight).double())
        # AdamW divides by the gradient's own size, so rounding of gradients near 0 moves single
        # weights by up to a learning rate; a wrong gradient moves all of a matrix by that much.
        # Two steps of up to 3e-3 move a weight of 0.02 by a part of its own size.
        assert difference <= 1e-4 * torch.linalg.vector_norm(weight.double()), key


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS, *FOUR_RANKS])
def test_layout_trains_like_a_single_process(name: str, outcomes: dict[str, Outcome]) -> None:
    compare(outcomes[name], outcomes["single"], list(TOLERANCES))


@pytest.mark.parametrize(
    ("variant", "layout"), [(name, each) for name, all_ in VARIANT_LAYOUTS.items() for each in all_]
)
def test_a_variant_trains_like_a_single_process(
    variant: str, layout: str, outcomes: dict[str, Outcome]
) -> None:
    compare(outcomes[f"{variant}_{layout}"], outcomes[variant], list(TOLERANCES))


@pytest.mark.parametrize(
    ("origin", "layout"), [(name, each) for name, all_ in MOVES.items() for each in all_]
)
def test_a_variant_goes_on_in_another_layout(
    origin: str, layout: str, outcomes: dict[str, Outcome]
) -> None:
    """Weights, moments, step count and data position all have to arrive for this."""
    variant = next(each for each in VARIANTS if origin.startswith(each))
    found = outcomes[f"{origin}_to_{layout}"]
    compare(found, outcomes[variant], list(TOLERANCES), first=1)


def test_dense_model_trains_alike_under_tensor_parallelism(outcomes: dict[str, Outcome]) -> None:
    compare(outcomes["dense_tp2"], outcomes["dense"], ["lm_loss", "grad_norm"])


@pytest.mark.parametrize("name", [name for layouts in JETMOE_LAYOUTS.values() for name in layouts])
def test_jetmoe_trains_like_a_single_process(name: str, jetmoe: dict[str, Outcome]) -> None:
    compare(jetmoe[name], jetmoe["single"], [*TOLERANCES, *MOA_TOLERANCES])


@pytest.mark.parametrize("name", MOA_DENSE_LAYOUTS)
def test_attention_experts_beside_a_dense_layer_train_alike(
    name: str, jetmoe: dict[str, Outcome]
) -> None:
    assert not jetmoe["moa_dense"].series("load_balancing_loss")
    compare(jetmoe[name], jetmoe["moa_dense"], list(MOA_TOLERANCES))


def test_jetmoe_training_moves_every_weight(jetmoe: dict[str, Outcome]) -> None:
    assert_moved(jetmoe)


def test_training_moves_every_weight(outcomes: dict[str, Outcome]) -> None:
    """The comparison above means nothing for a weight that never moved."""
    assert_moved(outcomes)


def assert_moved(outcomes: dict[str, Outcome]) -> None:
    final, initial = outcomes["single"].weights, outcomes["untrained"].weights
    for key, before in initial.items():
        moved = torch.linalg.vector_norm((final[key] - before).double())
        assert moved > 0, key
        assert moved >= 1e-3 * torch.linalg.vector_norm(before.double()), key
    losses = outcomes["single"].series("lm_loss")
    assert len(set(losses)) == len(losses)
