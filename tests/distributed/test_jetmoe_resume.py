"""A stopped JetMoE goes on bitwise in the same layout and alike in any other."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import Outcome, flags, run_cases

# The run is planned for four steps and saved after two; a later job goes on from there.
PLAN = {"train-iters": 4, "lr-decay-iters": 4, "global-batch-size": 4}
STOP = {**PLAN, "train-iters": 2}
KEYS = ("lm_loss", "moa_load_balancing_loss", "moa_z_loss", "load_balancing_loss", "z_loss")

TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
BF16: dict[str, object] = {"use-distributed-optimizer": True, "bf16": True}
# The first stage's tied weights have a bucket of their own, behind one that is padded: with 1 layer
# its length is no multiple of 128.
TIED: dict[str, object] = {**BF16, "pipeline-model-parallel-size": 2, "num-layers": 2}
LAYOUTS: dict[str, dict[str, object]] = {
    "tp2": TP2,
    "pp2": {"pipeline-model-parallel-size": 2},
    "pp2_interleaved": {
        "pipeline-model-parallel-size": 2,
        "num-virtual-stages-per-pipeline-rank": 2,
    },
    "ep2_distributed_optimizer": {
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "tp2_ep2": {**TP2, "expert-model-parallel-size": 2, "expert-tensor-parallel-size": 1},
    "dp2": {},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("jetmoe_resume")

    def case(layout: Mapping[str, object], plan: Mapping[str, object], **paths: Path) -> list[str]:
        return flags(**{**JETMOE, **plan, **layout, **paths})

    cases = {
        "whole": case(TP2, PLAN),
        "stopped": case(TP2, STOP, save=root / "tp2"),
        "whole_bf16": case(BF16, PLAN),
        "stopped_bf16": case(BF16, STOP, save=root / "bf16"),
        "resumed_bf16": case(BF16, PLAN, load=root / "bf16"),
        "whole_tied": case(TIED, PLAN),
        "stopped_tied": case(TIED, STOP, save=root / "tied"),
        "resumed_tied": case(TIED, PLAN, load=root / "tied"),
    }
    cases |= {name: case(layout, PLAN, load=root / "tp2") for name, layout in LAYOUTS.items()}
    single = {"single": case({}, PLAN, load=root / "tp2")}
    return {**run_cases(2, cases, root / "two"), **run_cases(1, single, root / "one")}


def last_two(outcome: Outcome, key: str) -> list[float]:
    assert outcome.error is None, outcome.error
    found = outcome.series(key)[-2:]
    assert len(found) == 2, key
    return found


@pytest.mark.parametrize(
    ("resumed", "whole"),
    [("tp2", "whole"), ("resumed_bf16", "whole_bf16"), ("resumed_tied", "whole_tied")],
)
def test_same_layout_resumes_bitwise(
    resumed: str, whole: str, outcomes: dict[str, Outcome]
) -> None:
    found, truth = outcomes[resumed], outcomes[whole]
    for key in (*KEYS, "grad_norm"):
        assert last_two(found, key) == last_two(truth, key), key
    assert found.series("iteration")[0] == 3
    for key, expected in truth.weights.items():
        assert torch.equal(found.weights[key], expected), key


@pytest.mark.parametrize("name", [*LAYOUTS, "single"])
def test_another_layout_goes_on_alike(name: str, outcomes: dict[str, Outcome]) -> None:
    for key in KEYS:
        expected = last_two(outcomes["whole"], key)
        assert last_two(outcomes[name], key) == pytest.approx(expected, rel=1e-5), key
    expected = last_two(outcomes["whole"], "grad_norm")
    assert last_two(outcomes[name], "grad_norm") == pytest.approx(expected, rel=1e-4)
    # What a single process holds is what every layout holds, under the agreed names.
    assert outcomes[name].weights.keys() == outcomes["whole"].weights.keys()


def test_checkpoint_has_the_agreed_names_and_shapes(outcomes: dict[str, Outcome]) -> None:
    """4 layers of h 48, 5 attention experts, 2 key/value heads of 10."""
    prefix = "decoder.layers."
    shapes = {
        key.removeprefix(prefix): list(weight.shape)
        for key, weight in outcomes["whole"].weights.items()
        if key.startswith((f"{prefix}self_attention.", f"{prefix}mlp.output_bias"))
    }
    assert shapes == {
        "self_attention.router.weight": [4, 5, 48],
        "self_attention.linear_kv.weight": [4, 40, 48],
        "self_attention.experts.weight_q": [4, 5, 20, 48],
        "self_attention.experts.weight_o": [4, 5, 48, 20],
        "self_attention.output_bias": [4, 48],
        "mlp.output_bias": [4, 48],
    }
