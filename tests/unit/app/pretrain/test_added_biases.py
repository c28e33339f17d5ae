"""Weights of a run without biases of experts can get them; a run that goes on cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron.trainer.checkpoint import CheckpointReader
from megatron.trainer.errors import CheckpointError
from megatron.trainer.resume import resume
from megatron.trainer.state import TrainState
from moe_app.pretrain import command
from moe_app.pretrain.config import PretrainConfig
from moe_ext.analysis.model_routers import find_routers
from tests.distributed.launcher import flags

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")


def begin(state: TrainState) -> None:
    resume(state, cast(PretrainConfig, state.cfg).model)


def test_biases_begin_at_0_beside_the_weights_of_a_run_without(
    tmp_path: Path, make_state: Callable[..., TrainState]
) -> None:
    torch.utils._device._device_constructors()
    run = tmp_path / "run"
    sizes: dict[str, Any] = {"num_layers": 2, "train_iters": 1}
    assert command.main(flags(**sizes, device="cpu", save=run)) == 0
    biased = {**sizes, "moe_router_enable_expert_bias": True, "load": run}

    tuned = make_state(**biased, save=tmp_path / "tuned", finetune=True)
    (module,) = tuned.modules
    routers = find_routers(module)
    for router in routers.values():
        assert router.expert_bias is not None
        with torch.no_grad():
            router.weight.zero_()
    begin(tuned)
    with CheckpointReader(run / "iter_0000001") as reader:
        stored = reader.read("decoder.layers.mlp.router.weight", (0, 0, 0), (2, 6, 48))
    for (_, layer), router in routers.items():
        assert torch.equal(router.weight, stored[layer])
        assert torch.equal(cast(torch.Tensor, router.expert_bias), torch.zeros(6))

    going_on = make_state(**biased, save=tmp_path / "on")
    with pytest.raises(
        CheckpointError, match=r"run without moe_router_enable_expert_bias, .* with --finetune"
    ):
        begin(going_on)
    other = make_state(**{**biased, "moe_router_topk": 2}, save=tmp_path / "other", finetune=True)
    with pytest.raises(CheckpointError, match=r"(?s)moe_router_topk: checkpoint 3, this run 2\n"):
        begin(other)
