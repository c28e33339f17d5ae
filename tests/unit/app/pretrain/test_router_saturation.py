"""Compare the saturation that training logs with routing computed apart, and its losses without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.resume import load_weights
from megatron.trainer.state import TrainState
from moe_app.pretrain import command
from moe_app.pretrain.config import PretrainConfig
from moe_app.pretrain.router_saturation import RouterSaturation
from moe_ext.config import MoEModelConfig
from tests.distributed.launcher import flags

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
SETTINGS: dict[str, Any] = {
    "num_layers": 2,
    "train_iters": 4,
    "save_interval": 2,
    "eval_interval": 1,
    "attention": "moa",
    "num_query_groups": 2,
    "num_attention_heads": 6,
    "kv_channels": 8,
    "lr": 0.1,
    "min_lr": 0.1,
    "lr_decay_style": "constant",
}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without the hook."""
    torch.utils._device._device_constructors()
    run = tmp_path_factory.mktemp("saturation") / "plain"
    assert command.main(flags(**SETTINGS, device="cpu", save=run)) == 0
    return run


@pytest.fixture(scope="module")
def reference(plain: Path) -> Path:
    return plain / "iter_0000002"


def test_saturation_is_full_at_the_reference_and_costs_no_step(
    plain: Path, reference: Path, tmp_path: Path
) -> None:
    logged = tmp_path / "logged"
    given = flags(**SETTINGS, device="cpu", save=logged, log_router_saturation=reference)
    assert command.main(given) == 0
    # Reading the reference left no trace in the run.
    for key in ("lm_loss", "grad_norm", "valid_loss"):
        values = [
            [record[key] for record in lines(run / "metrics.jsonl") if key in record]
            for run in (plain, logged)
        ]
        assert values[0] == values[1] and len(values[0]) == 4
    records = lines(logged / "router_saturation.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    keys = [f"{kind}saturation{first}" for kind in ("", "moa_") for first in ("", "_first")]
    for record in records:
        assert record["reference"] == str(reference)
        for key in keys:
            assert len(record[key]) == 2
            is_there = record["iteration"] == 2
            assert (min(record[key]) == 1.0) == is_there, record
    # Three of six experts agree for half of them by chance; one step moves them less far than two.
    assert all(0.2 < value < 1 for record in records[2:] for value in record["saturation"])


ADDED: dict[str, dict[str, Any]] = {
    "expert_bias": {"moe_router_enable_expert_bias": True},
    ".lora": {"lora_rank": 2, "lora_targets": "router"},
}


@pytest.mark.parametrize("part", ADDED)
def test_the_reference_is_routed_without_what_it_lacks(
    part: str, reference: Path, make_state: Callable[..., TrainState]
) -> None:
    """Biases and adapters that a run has learned are the run's alone."""
    given = {**SETTINGS, "save_interval": 0, "log_router_saturation": reference}
    truth = saturation_of(make_state(**given))
    state = make_state(**given, **ADDED[part])
    own = [
        tensor
        for module in state.modules
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if part in name
    ]
    with torch.no_grad():
        for number, tensor in enumerate(own):
            tensor.copy_(torch.linspace(-9, 9, tensor.numel()).view_as(tensor) * (-1) ** number)
    before = [tensor.clone() for tensor in own]
    hook = saturation_of(state)
    assert own and all(map(torch.equal, own, before))
    for name, choices in truth._reference.items():
        assert (hook._reference[name] == choices).all()
    # The run's own routing, of other weights and with what it has learned, is another.
    with torch.no_grad():
        load_weights(state.modules, FoundCheckpoint(path=reference, iteration=2), lacking=(part,))
    now = hook._choose()
    assert any((now[name] != choices).any() for name, choices in truth._reference.items())


def saturation_of(state: TrainState) -> RouterSaturation:
    return RouterSaturation(state, cast(PretrainConfig, state.cfg).model, NEXT_TOKEN)


def refuse(state: TrainState, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        saturation_of(state)


def test_what_cannot_be_compared_is_refused(
    reference: Path, make_state: Callable[..., TrainState]
) -> None:
    given = {**SETTINGS, "save_interval": 0, "log_router_saturation": reference}
    other = make_state(**{**given, "moe_router_topk": 2, "moa_router_topk": 3})
    refuse(other, CheckpointError, "moe_router_topk")
    place = reference.parent / "iter_0000009"
    gone = make_state(**{**given, "log_router_saturation": place})
    refuse(gone, CheckpointError, "has no checkpoint of iteration 9")
    state = make_state(**given)
    state.validation.clear()
    refuse(state, ConfigError, "there is no validation set")
    dense = MoEModelConfig(num_experts=None, attention="full_width_qk_norm")
    with pytest.raises(ConfigError, match="the model has no experts"):
        RouterSaturation(state, dense, NEXT_TOKEN)
