"""One gloo rank on the CPU: for blocks that megatron-core builds with process groups, for runs."""

import multiprocessing
import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.trainer.runtime.cpu_backend import redirect_cuda
from megatron.trainer.runtime.launch import RunContext, initialize, shut_down
from megatron.trainer.state import TrainState
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from moe_ext.compat import without_cuda_graphs
from tests.distributed.launcher import flags

OF_BENCHMARKS = (
    "benchmarks.layer_megatron",
    "benchmarks.layer_transformers",
    "benchmarks.moe_layer",
    "benchmarks.step_peers",
    "benchmarks.train_step",
    "transformers.models.jetmoe.modeling_jetmoe",
    "transformers.models.olmoe.modeling_olmoe",
)


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Forks the workers of benchmarks from a process that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    server: Any = multiprocessing.forkserver._forkserver
    server._stop()  # another test's has other imports
    context.set_forkserver_preload(list(OF_BENCHMARKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.workers.multiprocessing.get_context", lambda _method: context)
        yield
    server._stop()
    context.set_forkserver_preload([])


@pytest.fixture
def make_config() -> Callable[..., TransformerConfig]:
    """Builds a float64 MoE config of one layer; any field can be changed."""

    def build(**changes: object) -> TransformerConfig:
        fields = {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": True,
            "moe_ffn_hidden_size": 6,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "bias_activation_fusion": False,
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "params_dtype": torch.float64,
            "use_cpu_initialization": True,
            **without_cuda_graphs(),
        }
        return TransformerConfig(**{**fields, **changes})

    return build


@pytest.fixture
def single_rank(tmp_path: Path) -> Iterator[ProcessGroupCollection]:
    """All process groups, of one rank each; torn down after the test."""
    # torch.device("meta") knows factories by identity and looks them up once, on first use: before
    # they are redirected, or it would miss them for the rest of the process.
    torch.utils._device._device_constructors()
    redirect_cuda()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets the scale of router losses, which a lone backward pass leaves as no schedule does."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


@pytest.fixture
def make_state() -> Iterator[Callable[..., TrainState]]:
    """Builds the tiny model's state from flags; another call puts an end to the run before."""
    threads = torch.get_num_threads()
    started: list[RunContext] = []

    def make(**overrides: Any) -> TrainState:
        cfg = parse_recipe(flags(device="cpu", **overrides), prog="test", description="")
        if started:
            shut_down(keep_world=True)
        started.append(initialize(cfg))
        return build_state(cfg, started[-1])

    yield make
    if started:
        shut_down()
    torch.set_num_threads(threads)
