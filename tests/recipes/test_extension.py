"""Tests the example of a custom router and decay, which its README trains with."""

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.trainer.optim.schedules import DECAYS
from megatron.trainer.runtime.launch import shut_down
from moe_app.pretrain import command
from moe_ext.routers import ROUTERS
from tests.distributed.launcher import REPO, alone

EXAMPLE = REPO / "examples" / "extension" / "sigmoid_router.py"
FLAGS = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-experts 8 --moe-router-topk 2"
    " --moe-ffn-hidden-size 16 --vocab-size 64 --seq-length 32 --train-iters 3 --lr 0.01"
    " --min-lr 0.001 --init-method-std 0.5 --log-interval 1 --no-tensorboard"
).split()
"""Flags of a tiny run, with initial weights so large that the routing rules differ."""


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """Import the example, and unregister its blocks afterwards."""
    tables: tuple[dict[str, Any], ...] = (ROUTERS, DECAYS)
    before = [dict(table) for table in tables]
    spec = importlib.util.spec_from_file_location("sigmoid_router", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def run_here() -> Iterator[Callable[[list[str]], int]]:
    """Return `pretrain.main`, and restore the state of this process afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # torch.device("meta") looks up its factories once; do so before they are redirected to the CPU.
    torch.utils._device._device_constructors()
    yield command.main
    if torch.distributed.is_initialized():
        shut_down()
    root.handlers[:] = handlers
    root.setLevel(level)


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lm_loss" in record]


def reference_weights(logits: Tensor, k: int) -> Tensor:
    """Compute the weights [e] of one token's experts, one number at a time."""
    gates = [1.0 / (1.0 + (-logit).exp()) for logit in logits]
    best = sorted(range(len(gates)), key=lambda expert: -gates[expert].item())[:k]
    total = sum(gates[expert] for expert in best)
    zero = torch.zeros((), dtype=logits.dtype)
    return torch.stack([gates[e] / total if e in best else zero for e in range(len(gates))])


def test_router_matches_a_reference_in_value_and_gradient(example: ModuleType) -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    experts, gates, scores = example.SigmoidTopKRouter.select(SimpleNamespace(topk=3), logits)
    exact = logits.detach().double().requires_grad_()
    expected = torch.stack([reference_weights(row, 3) for row in exact])
    everyone = torch.stack([reference_weights(row, 8) for row in exact])
    # fp32 against fp64, over a handful of operations on numbers up to 1
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    probs = torch.zeros_like(logits).scatter(1, experts, gates)
    torch.testing.assert_close(probs.double(), expected, **close)
    torch.testing.assert_close(scores.double(), everyone, **close)
    assert torch.equal(probs > 0, expected > 0)
    weights = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    ((probs + 2 * scores) * weights).sum().backward()
    ((expected + 2 * everyone) * weights.double()).sum().backward()
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, **close)


def test_example_trains_with_its_own_router_and_decay(tmp_path: Path) -> None:
    own, ours = tmp_path / "own", tmp_path / "ours"
    names = ["--router", "sigmoid_topk", "--lr-decay-style", "sqrt"]
    for script, arguments in (
        (EXAMPLE, [*names, "--save", str(own)]),
        (REPO / "tools" / "pretrain.py", ["--save", str(ours)]),
    ):
        done = alone(script, *FLAGS, *arguments)
        assert done.returncode == 0, done.stderr[-4000:]

    assert "router: sigmoid_topk\n" in (own / "config.yaml").read_text()
    with_own, with_ours = records(own), records(ours)
    assert [record["iteration"] for record in with_own] == [1, 2, 3]
    for step, record in enumerate(with_own):
        rate = 0.001 + (0.01 - 0.001) * (1 - math.sqrt(step / 3))
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
    # Both start with the same weights. Normalised sigmoids are flatter than a softmax: near 0 their
    # logarithm grows half as fast with the logit, and it is bounded.
    assert with_own[0]["moe_entropy"] > with_ours[0]["moe_entropy"] + 0.01
    assert with_own[0]["lm_loss"] != with_ours[0]["lm_loss"]


def test_without_the_example_its_router_is_unknown(
    run_here: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here([*FLAGS, "--router", "sigmoid_topk"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ConfigError: unknown router 'sigmoid_topk'; known: expert_choice, expert_choice_grouped,"
        " softmax_topk, topk_softmax"
    )
