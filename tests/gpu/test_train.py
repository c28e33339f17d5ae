"""Trains on one GPU through the pretrain command: against the CPU, and across a restart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.trainer.loop import Upkeep, train
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.resume import checkpoint_writer, resume
from megatron.trainer.runtime.launch import initialize, shut_down
from megatron.trainer.runtime.upstream_warnings import hide_upstream_warnings
from megatron.trainer.state import TrainState, sharded_state
from moe_app.pretrain import command
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from tests.distributed.launcher import flags
from tests.paths import REPO

pytestmark = pytest.mark.gpu

STEPS = 6
# Widths that the grouped GEMM supports: rows of a multiple of 16 bytes.
SIZES = {
    "hidden-size": 64,
    "num-attention-heads": 4,
    "moe-ffn-hidden-size": 32,
    "train-iters": STEPS,
    "lr-decay-iters": STEPS,
}


def run_flags(**changes: Any) -> list[str]:
    return flags(**{**SIZES, **{key.replace("_", "-"): value for key, value in changes.items()}})


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lm_loss" in record]


def series(directory: Path, key: str) -> list[float]:
    return [record[key] for record in records(directory)]


def run(**changes: Any) -> None:
    assert command.main(run_flags(**changes)) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def single(root: Path) -> Path:
    """Run fp32 on the GPU without a stop."""
    run(save=root / "single")
    return root / "single"


@pytest.fixture(scope="module")
def single_bf16(root: Path) -> Path:
    """Run bf16 on the GPU without a stop."""
    run(save=root / "single_bf16", bf16=True)
    return root / "single_bf16"


def test_fp32_on_the_gpu_trains_like_the_cpu(root: Path, single: Path) -> None:
    """Compares runs with bitwise equal weights and data; only the order of sums differs."""
    # As a module, from the repository: it need not be installed.
    command = [sys.executable, "-m", "moe_app.pretrain"]
    command += run_flags(save=root / "cpu", device="cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        command, cwd=REPO, env=environment, timeout=300, check=False, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for key in ("lm_loss", "load_balancing_loss", "z_loss"):
        expected = series(root / "cpu", key)
        assert len(expected) == STEPS
        # Ten times the tolerance between layouts on the CPU, for CUDA's own exp and rsqrt.
        assert series(single, key) == pytest.approx(expected, rel=1e-4), key
    # Of gradients, which the backward pass rounds too: ten times that of losses.
    assert series(single, "grad_norm") == pytest.approx(series(root / "cpu", "grad_norm"), rel=1e-3)


def test_bf16_trains_like_fp32(single: Path, single_bf16: Path) -> None:
    """Compares losses: bf16 rounds by up to 0.4 %, means over 128 tokens by 2e-4 on a CPU."""
    assert series(single_bf16, "lm_loss") == pytest.approx(series(single, "lm_loss"), rel=1e-3)
    # The first gradients come from equal weights; they differ by 4e-4 on a CPU.
    assert series(single_bf16, "grad_norm")[0] == pytest.approx(
        series(single, "grad_norm")[0], rel=5e-3
    )
    assert series(single_bf16, "lm_loss") != series(single, "lm_loss")


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed_optimizer"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_stopped_run_resumes_with_the_same_losses(
    bf16: bool, is_sharded: bool, root: Path, single: Path, single_bf16: Path
) -> None:
    """Compares to rounding, because atomic adds on a GPU sum in any order.

    `test_checkpoint_restores_every_bit` is the exact half of this claim.
    """
    directory = root / f"stopped_{bf16}_{is_sharded}"
    common = {"bf16": bf16, "use_distributed_optimizer": is_sharded, "save": directory}
    run(train_iters=STEPS // 2, async_save=is_sharded, **common)
    run(load=directory, **common)
    whole = single_bf16 if bf16 else single
    assert series(directory, "iteration") == list(range(1, STEPS + 1))
    for key in ("consumed_samples", "learning_rate"):
        assert series(directory, key) == series(whole, key)
    tolerance = 1e-3 if bf16 else 1e-4
    assert series(directory, "lm_loss") == pytest.approx(series(whole, "lm_loss"), rel=tolerance)


def build(*arguments: str) -> TrainState:
    cfg = parse_recipe(list(arguments), prog="test", description="")
    state = build_state(cfg, initialize(cfg))
    resume(state, cfg.model)
    return state


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Return weights, moments, master weights and random states by their checkpoint names."""
    found = {}
    for value in nested_values(sharded_state(state)):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in nested_values({"part": built}):
            if isinstance(part, ShardedTensor):
                found[f"{part.key}{part.global_offset}"] = part.data.detach().cpu().clone()
    return found


@hide_upstream_warnings()
@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "distributed_optimizer"])
def test_checkpoint_restores_every_bit(is_sharded: bool, tmp_path: Path) -> None:
    arguments = run_flags(
        train_iters=2, bf16=True, use_distributed_optimizer=is_sharded, save=tmp_path
    )
    state = build(*arguments)
    assert state.ctx.device.type == "cuda"
    train(state, NEXT_TOKEN, hooks=[], upkeep=Upkeep(save=checkpoint_writer(state)))
    saved = tensors(state)
    shut_down()
    state = build(*arguments, "--load", str(tmp_path))
    loaded = tensors(state)
    shut_down()
    assert state.iteration == 2
    assert any("exp_avg_sq" in name for name in saved)
    assert any("fp32_param" in name for name in saved)
    assert loaded.keys() == saved.keys()
    for name, expected in saved.items():
        assert torch.equal(loaded[name], expected), name
