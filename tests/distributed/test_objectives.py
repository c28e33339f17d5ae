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
from moe_ext.convert.peft_form import peft_config, peft_tensors
from moe_ext.layers.lora import TARGETS, LoRA
from tests.distributed.hf_models import to_hf
from tests.distributed.launcher import HERE, ranks
from tests.distributed.trl_truth import (
    BETA,
    Trainers,
    Truth,
    losses_with_adapters,
    trainers_of,
    truths_of,
)

FAMILIES = ("olmoe", "jetmoe")
VARLEN = ["--packed-attention", "varlen"]
"""Texts of a sequence apart without the mask that `one` uses."""
TP2 = ["--tensor-model-parallel-size", "2"]
RMSPROP = ["--optimizer", "rmsprop", "--lr", "1e-3", "--min-lr", "1e-3"]
LORA = ["--lora-rank", "3", "--lora-alpha", "5", "--lr", "1e-2", "--min-lr", "1e-2"]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {
        "one": [],
        "pairs": ["--micro-batch-size", "2", *VARLEN],
        "recompute": ["--recompute-granularity", "full"],
        "block": ["--recompute-granularity", "full", "--recompute-method", "block", *VARLEN],
        "modules": ["--recompute-granularity", "selective", *VARLEN],
        "bf16": ["--bf16"],
        "rmsprop": RMSPROP,
        "lora": [*LORA, "--lora-targets", "attention,experts,router"],
    },
    2: {
        "tp2": [*TP2, *VARLEN],
        "pp2": ["--pipeline-model-parallel-size", "2", *VARLEN],
        "ep2": ["--expert-model-parallel-size", "2"],
        "etp2": ["--expert-tensor-parallel-size", "2"],
        "dp2": [],
        "cp2": ["--context-parallel-size", "2", *VARLEN],
        "bf16tp2": ["--bf16", *TP2, "--use-distributed-optimizer"],
        "rmsproptp2": [*RMSPROP, *TP2, "--use-distributed-optimizer"],
        "loratp2": [*LORA, "--lora-targets", "attention,experts,router", *TP2],
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
BOTH_METHODS = [("dpo", False), ("kto", True)]
TRAINED = {"rmsprop": [("kto 3", False)], "lora": [("dpo 3", True)]}
"""Three steps of training."""


def steps_of(layout: str) -> list[tuple[str, bool]]:
    """Return the objectives of a layout, each packed or not."""
    if layout.startswith("bf16"):
        return BOTH_METHODS
    if layout == "etp2":
        return [*BOTH_METHODS, *ROUTER_LOSSES[:1]]
    if (name := layout.removesuffix("tp2")) in TRAINED:
        return TRAINED[name]
    if layout in ("block", "modules"):
        return ROUTER_LOSSES[1:]
    if layout == "one":
        return [*EVERYWHERE, *ON_ONE_RANK, *TEXTS_ALONE, *ROUTER_LOSSES]
    return EVERYWHERE if layout == "pairs" else [*EVERYWHERE, *ROUTER_LOSSES]


STEPS = {layout: steps_of(layout) for layouts in LAYOUTS.values() for layout in layouts}
EVERY_CASE = [
    f"{family} {layout} {name} {'packed' if packed else 'padded'}"
    for family in FAMILIES
    for layout, steps in STEPS.items()
    for name, packed in steps
]
CASES = [
    case
    for case in EVERY_CASE
    if not any(part in case for part in (" aux", " bf16", " rmsprop", " lora"))
]
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
    trainers: dict[str, Trainers]
    by_family: dict[str, dict[str, Truth]]

    def of(self, case: str) -> Truth:
        family, _, *name, _ = case.split()
        return self.by_family[family][" ".join(name)]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Truths:
    out = tmp_path_factory.mktemp("objectives")
    found, kept = {}, {}
    for family in FAMILIES:
        with warnings.catch_warnings(action="ignore"):  # trl calls what transformers deprecates
            trainers = trainers_of(family, out / "trl")
            found[family] = truths_of(trainers)
        kept[family] = trainers
        given = {
            "config": trainers.policy.config.to_diff_dict(),
            "policy": dict(trainers.policy.state_dict()),
            "reference": dict(trainers.reference.state_dict()),
        }
        torch.save(given, out / f"{family}.pt")
    return Truths(out, kept, found)


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
            gradients=to_hf(family, model, "fused", native) if native else {},
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


@pytest.mark.parametrize("case", [case for case in EVERY_CASE if " rmsprop" in case])
def test_losses_of_training_by_rmsprop_are_those_of_trl(
    case: str, truths: Truths, taken: dict[str, Step]
) -> None:
    truth = truths.by_family[case.split()[0]]["kto rmsprop"].metrics["losses"]
    assert truth[2] < truth[1] < truth[0] * 0.99
    assert taken[case].metrics["losses"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("case", [case for case in EVERY_CASE if " bf16" in case])
def test_bf16_is_as_near_to_fp32_as_its_digits_allow(case: str, taken: dict[str, Step]) -> None:
    family, _, name, form = case.split()
    exact, found = taken[f"{family} one {name} {form}"], taken[case]
    # Of 8 bits. trl's own errors in bf16 are as large: 0.3 of this in rewards and losses.
    digits = 2**-7
    for key in ("logps_chosen", "logps_rejected"):
        assert found.metrics[key] == pytest.approx(exact.metrics[key], rel=digits)
    rounding = BETA * digits * abs(exact.metrics["logps_chosen"])
    for key in (f"{name}_loss", "rewards_chosen", "rewards_rejected"):
        assert found.metrics[key] == pytest.approx(exact.metrics[key], abs=rounding), key
    size = torch.cat([each.flatten() for each in exact.gradients.values()]).double().norm()
    errors = [(found.gradients[key] - each).flatten() for key, each in exact.gradients.items()]
    # Where two experts are nearly alike, a token may be given the other one.
    assert 1e-3 < torch.cat(errors).double().norm() / size < 0.1


@pytest.fixture(scope="module")
def lora_losses(truths: Truths, taken: dict[str, Step]) -> dict[str, list[float]]:
    """Return by family the losses of trl's training of the adapters that our run began with."""
    assert taken  # the run has saved them
    lora, found = LoRA(rank=3, alpha=5.0, targets=tuple(TARGETS)), {}
    for family, trainers in truths.trainers.items():
        config = trainers.policy.config.to_diff_dict()
        model = family_from_config(config).model_config(config)
        native = torch.load(truths.out / f"{family} lora.adapters.pt", weights_only=True)
        tensors = dict(peft_tensors(family, model, lora, native.__getitem__))
        settings = peft_config(family, model, lora, None)
        with warnings.catch_warnings(action="ignore"):  # of peft, about a model that it patched
            found[family] = losses_with_adapters(trainers, settings, tensors, steps=3)
    return found


@pytest.mark.parametrize("case", [case for case in EVERY_CASE if " lora" in case])
def test_losses_of_training_adapters_are_those_of_trl_and_peft(
    case: str, taken: dict[str, Step], lora_losses: dict[str, list[float]]
) -> None:
    truth = lora_losses[case.split()[0]]
    assert truth[2] < truth[1] < truth[0] * 0.99
    assert taken[case].metrics["losses"] == pytest.approx(truth, rel=1e-5)
