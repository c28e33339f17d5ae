"""One of two ranks of test_collective: writes down how each stage ended on it.

Usage: torchrun ... worker_collective.py OUT
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch.distributed as dist

from megatron.trainer.errors import CheckpointError, ConfigError, DataError
from megatron.trainer.runtime.collective import (
    broadcast,
    gather,
    on_all_ranks,
    on_rank0,
    require_same,
)
from moe_app.pretrain.same_kernels import agree_on_kernels
from moe_ext.kernels import fused


def ended(stage: Callable[[], Any]) -> str:
    try:
        return str(stage())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(failing: dict[int, Exception], *, ran: list[int] | None = None) -> Callable[[], str]:
    """Work that fails on some ranks."""

    def act() -> str:
        if ran is not None:
            ran.append(dist.get_rank())
        if dist.get_rank() in failing:
            raise failing[dist.get_rank()]
        return f"by rank {dist.get_rank()}"

    return act


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    full, bug = OSError(28, "No space left on device"), KeyError("x")
    ran: list[int] = []
    everywhere: dict[str, tuple[dict[int, Exception], dict[str, Any]]] = {
        "well": ({}, {}),
        "user error on rank 1": ({1: DataError("x.idx is missing")}, {}),
        "user errors on both": ({0: ConfigError("first"), 1: DataError("second")}, {}),
        "full disk on rank 1": ({1: full}, {}),
        "full disks as checkpoint errors": ({0: full, 1: full}, {"error_class": CheckpointError}),
        "bug on rank 1": ({1: bug}, {}),
        "bug on rank 1 as a checkpoint error": ({1: bug}, {"error_class": CheckpointError}),
    }
    found = {
        name: ended(lambda: on_all_ranks("mixing", work(failing), **options))  # noqa: B023
        for name, (failing, options) in everywhere.items()
    }
    values: dict[str, object] = {"lr": 0.5, "seed": rank, **({"extra": 1} if rank else {})}

    def same(values: dict[str, object]) -> None:
        require_same("settings", values, error_class=ConfigError, remedy="use the same")

    def kernels(problem: str | None, backend: str, setting: Literal["auto", "off"]) -> None:
        with mock.patch.object(fused, "problem_on", lambda _device: problem):
            agree_on_kernels(backend=backend, fused_kernels=setting, device_type="cuda")

    odd = "triton is missing" if rank else None
    found |= {
        "same kernels": ended(lambda: kernels(None, "triton", "auto")),
        "other backend on rank 1": ended(lambda: kernels(None, ["triton", "cute"][rank], "off")),
        "no fused kernels on rank 1": ended(lambda: kernels(odd, "triton", "auto")),
        "fused kernels off": ended(lambda: kernels(odd, "triton", "off")),
        "gather": str(gather(rank * 10)),
        "broadcast": str(broadcast(rank * 10)),
        "rank 0 well": ended(lambda: on_rank0("reading", work({}, ran=ran))),
        "rank 0 user error": ended(lambda: on_rank0("reading", work({0: DataError("damaged")}))),
        "rank 0 full disk": ended(lambda: on_rank0("reading", work({0: full}))),
        "rank 0 bug": ended(lambda: on_rank0("reading", work({0: bug}))),
        "the same": ended(lambda: same({"lr": 0.5})),
        "not the same": ended(lambda: same(values)),
        "ran": str(ran),
        "after": str(gather(rank)),
    }
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
