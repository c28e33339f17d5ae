"""A rank whose layers have no experts goes on: its optimizer of experts has no parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron.trainer.checkpoint import CheckpointReader
from megatron.trainer.optim.sharded_state import optimizer_state
from megatron.trainer.resume import resume
from megatron.trainer.state import TrainState, model_state
from moe_app.pretrain import command
from moe_app.pretrain.config import PretrainConfig
from tests.distributed.launcher import flags

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")


def test_an_optimizer_without_parameters_has_nothing_to_load(
    tmp_path: Path, make_state: Callable[..., TrainState]
) -> None:
    torch.utils._device._device_constructors()
    run = tmp_path / "run"
    sizes: dict[str, Any] = {"num_layers": 1, "lr_decay_iters": 2}
    assert command.main(flags(**sizes, train_iters=1, device="cpu", save=run)) == 0

    state = make_state(**sizes, train_iters=2, load=run, save=run)
    first, *_ = state.optimizer.chained_optimizers
    group = {**first.optimizer.param_groups[0], "params": []}
    empty = FP32Optimizer(torch.optim.AdamW([group]), first.config, first.init_state_fn)
    state.optimizer.chained_optimizers.append(empty)
    saved = optimizer_state(state.optimizer, model_state(state.modules), is_loading=False)
    assert saved.keys() == {"0", "1"}  # dense, experts, and not the empty one
    resume(state, cast(PretrainConfig, state.cfg).model)

    assert state.iteration == 1
    with CheckpointReader(run / "iter_0000001") as reader:
        key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
        stored = reader.read(key, (0,), (48,))
    moments = [each["exp_avg"] for each in first.optimizer.state.values()]
    assert any(each.shape == stored.shape and torch.equal(each, stored) for each in moments)
