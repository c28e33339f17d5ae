"""What a run with two kinds of routers writes of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_app.pretrain.config import PretrainConfig
from moe_app.pretrain.describe import describe_run
from moe_app.pretrain.hooks import ExpertLoad, RouterHealth
from moe_ext.config import MoEModelConfig
from moe_ext.experts import EXPERT_BACKENDS, BackendChoice
from moe_ext.metrics import RouterMetrics
from moe_ext.presets import PRESETS


def measured(num_experts: int, layers: dict[int, list[int]]) -> RouterMetrics:
    metrics = RouterMetrics(2, num_experts)
    for layer, counts in layers.items():
        metrics.record(
            layer,
            load_balancing=torch.tensor(1.5),
            z_sum=torch.tensor(8.0),
            entropy_sum=torch.tensor(4.0),
            tokens_per_expert=torch.tensor(counts),
            num_tokens=4,
            group_size=1,
        )
    return metrics


@pytest.fixture
def health() -> RouterHealth:
    feed_forward = measured(4, {1: [4, 4, 0, 0], 2: [2, 2, 2, 2]})
    attention = measured(2, {1: [3, 5], 2: [8, 0]})
    return RouterHealth({"moe": feed_forward, "moa": attention})


def test_both_kinds_are_in_the_record(health: RouterHealth) -> None:
    record = health.reduce()
    assert record["layer_dead_experts"] == [2, 0]
    assert record["moa_layer_dead_experts"] == [0, 1]
    assert record["moe_max_load_ratio"] == 2.0
    assert record["moa_max_load_ratio"] == 2.0
    assert record["moa_layer_max_load_ratio"] == [1.25, 2.0]


def test_reset_forgets_both_kinds(health: RouterHealth) -> None:
    health.reset()
    assert "z_loss" not in health.reduce()
    assert "moa_z_loss" not in health.reduce()


@pytest.mark.usefixtures("with_pixels")
def test_both_loads_are_written_and_drawn(health: RouterHealth, tmp_path: Path) -> None:
    hook = ExpertLoad(health, tmp_path)
    hook.on_start(0, 10)
    record: dict[str, Any] = {"iteration": 3, **health.reduce()}
    hook.on_log(record)
    hook.on_end()
    (line,) = (tmp_path / "expert_load.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "iteration": 3,
        "load": [[2.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
        "moa_load": [[0.75, 1.25], [2.0, 0.0]],
    }
    plots = {file.name for file in (tmp_path / "plots").iterdir()}
    assert plots == {"expert_load.png", "expert_moa_load.png"}


def test_the_log_says_what_each_kinds_losses_are_multiplied_by() -> None:
    """OLMoE's convention divides the z-loss by k, which may differ between the two."""
    values = {
        **PRESETS["jetmoe_8b"],
        "moe_loss_convention": "olmoe",
        "moa_num_experts": 6,
        "moa_router_topk": 3,
        "num_attention_heads": 48,
    }
    layout = SimpleNamespace(
        tensor=1,
        pipeline=1,
        virtual_stages=1,
        context=1,
        expert=1,
        expert_tensor=1,
        data=1,
        sequence_parallel=False,
    )
    cfg: Any = PretrainConfig(model=MoEModelConfig(**values))
    ctx: Any = SimpleNamespace(
        layout=layout, world_size=1, device=SimpleNamespace(type="cpu"), num_threads=1
    )
    backend = BackendChoice(name="loop", reason="it is built", backend=EXPERT_BACKENDS["loop"])
    text = "\n".join(describe_run(cfg, ctx, backend))
    assert "\nexpert backend: loop, it is built\n" in text
    assert "\nexperts: 8 per layer, 2 per token, router topk_softmax" in text
    assert "\nattention experts: 6 per layer, 3 per token, router topk_softmax" in text
    assert f"\nrouter z-loss: coefficient 0.001 in the 'olmoe' convention = {0.001 / 48:g} " in text
    wanted = f"coefficient 0.001 in the 'olmoe' convention = {0.001 / 72:g} for each layer's loss"
    assert f"\nattention router z-loss: {wanted}" in text
