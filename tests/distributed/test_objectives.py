"""Compare steps of fine-tuning and alignment with trl's, in every layout, packed and padded."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.convert import family_from_config
from tests.distributed.hf_models import to_hf
from tests.distributed.launcher import HERE, ranks
from tests.distributed.trl_truth import BETA, Truth, trainers_of, truths_of

FAMILIES = ("olmoe", "jetmoe")
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {
        "one": [],
        "pairs": ["--micro-batch-size", "2"],
        "recompute": ["--recompute-granularity", "full"],
        "block": ["--recompute-granularity", "full", "--recompute-method", "block"],
        "modules": ["--recompute-granularity", "selective"],
    },
    2: {
        "tp2": ["--tensor-model-parallel-size", "2"],
        "pp2": ["--pipeline-model-parallel-size", "2"],
        "ep2": ["--expert-model-parallel-size", "2"],
        "etp2": ["--expert-tensor-parallel-size", "2"],
        "dp2": [],
        "cp2": ["--context-parallel-size", "2"],
    },
}
EVERYWHERE = [(name, packed) for name in ("dpo", "kto", "sample-mean") for packed in (False, True)]
ON_ONE_RANK = [
    (name, packed)
    for name in ("dpo smooth", "dpo average", "token-mean", "sum")
    for packed in (False, True)
]
ROUTER_LOSSES = [("aux", packed) for packed in (False, True)]
"""Router losses on; they are of a micro-batch, so that the truth has as large ones."""
TEXTS_ALONE = [("aux alone", packed) for packed in (False, True)]
"""Their truth: rows as long as what is in them."""
STEPS = {
    layout: [
        *([] if layout in ("block", "modules") else EVERYWHERE),
        *([*ON_ONE_RANK, *TEXTS_ALONE] if layout == "one" else []),
        *([] if layout == "pairs" else ROUTER_LOSSES),
    ]
    for layouts in LAYOUTS.values()
    for layout in layouts
}
EVERY_CASE = [
    f"{family} {layout} {name} {'packed' if packed else 'padded'}"
    for family in FAMILIES
    for layout, steps in STEPS.items()
    for name, packed in steps
]
CASES = [case for case in EVERY_CASE if " aux" not in case]
WITH_ROUTER_LOSSES = [case for case in EVERY_CASE if " aux p" in case]


@dataclass(frozen=True)
class Step:
    """What a step of ours gave."""

    metrics: dict[str, Any]
    grad_norm: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Truths:
    """What steps should give, by family and objective, and where the models are."""

    out: Path
    by_family: dict[str, dict[str, Truth]]

    def of(self, case: str) -> Truth:
        family, _, *name, _ = case.split()
        return self.by_family[family][" ".join(name)]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    out = tmp_path_factory.mktemp("objectives")
    found = {}
    for family in FAMILIES:
        with warnings.catch_warnings(action="ignore"):  # trl calls what transformers deprecates
            trainers = trainers_of(family, out / "trl")
            found[family] = truths_of(trainers)
        given = {
            "config": trainers.policy.config.to_diff_dict(),
            "policy": dict(trainers.policy.state_dict()),
            "reference": dict(trainers.reference.state_dict()),
        }
        torch.save(given, out / f"{family}.pt")
    return Truths(out, found)


@pytest.fixture(scope="module")
def taken(truths: Truths) -> dict[str, Step]:
    """Return the steps of every case."""
    out = truths.out
    found: dict[str, Step] = {}
    for num_ranks, layouts in LAYOUTS.items():
        cases = [
            {
                "name": f"{family} {layout}",
                "model": family,
                "flags": flags,
                "steps": STEPS[layout],
            }
            for family in FAMILIES
            for layout, flags in layouts.items()
        ]
        file = out / f"cases{num_ranks}.json"
        file.write_text(json.dumps(cases))
        done = ranks(num_ranks, HERE / "worker_objectives.py", str(file), str(out))
        assert done.returncode == 0, done.stderr[-6000:]
        for case in cases:
            found |= _read(out, str(case["name"]), str(case["model"]), num_ranks)
    return found


def _read(out: Path, case: str, family: str, num_ranks: int) -> dict[str, Step]:
    """Put the ranks' shards of gradients together, under transformers' names."""
    config = torch.load(out / f"{family}.pt", weights_only=True)["config"]
    model = family_from_config(config).model_config(config)
    parts = [
        torch.load(out / f"{case}.rank{rank}.pt", weights_only=True) for rank in range(num_ranks)
    ]
    found = {}
    for name, first in parts[0].items():
        native: dict[str, Tensor] = {}
        for part in parts:
            for key, shape, offset, gradient in part[name]["gradients"]:
                full = native.setdefault(key, torch.full(shape, torch.nan))
                window = zip(offset, gradient.shape, strict=True)
                full[tuple(slice(start, start + size) for start, size in window)] = gradient
        found[f"{case} {name}"] = Step(
            metrics=first["metrics"],
            grad_norm=first["grad_norm"],
            gradients=to_hf(family, model, "fused", native),
        )
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_and_rewards_are_those_of_trl(
    case: str, truths: Truths, taken: dict[str, Step]
) -> None:
    truth, found = truths.of(case).metrics, taken[case].metrics
    # A reward may be all but 0: the difference of log-probabilities of some nats, as fp32 has them.
    rounding = BETA * 1e-6
    assert {name: found[name] for name in truth} == pytest.approx(truth, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_trl(case: str, truths: Truths, taken: dict[str, Step]) -> None:
    truth, found = truths.of(case).gradients, taken[case]
    whole = torch.cat([each.flatten() for each in truth.values()]).double().norm()
    assert found.grad_norm == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in truth.items():
        size = gradient.double().norm()
        assert size > 0, name
        assert (found.gradients[name] - gradient).double().norm() <= 1e-5 * size, name


@pytest.mark.parametrize("case", WITH_ROUTER_LOSSES)
def test_router_losses_of_padded_rows_are_those_of_the_texts_alone(
    case: str, taken: dict[str, Step]
) -> None:
    family, _, _, form = case.split()
    truth, found = taken[f"{family} one aux alone {form}"], taken[case]
    assert truth.metrics["load_balancing_loss"] > 1.01
    for name, value in truth.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert found.grad_norm == pytest.approx(truth.grad_norm, rel=1e-5)
    for name, gradient in truth.gradients.items():
        size = gradient.double().norm()
        assert size > 0, name
        assert (found.gradients[name] - gradient).double().norm() <= 1e-5 * size, name
