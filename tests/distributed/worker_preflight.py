"""Runs the pre-flight check again and again in the ranks that torchrun started, with faults.

Usage: torchrun ... worker_preflight.py OUT

Writes OUT/NAME.rankR.json for each case: the lines, or {"error": ...}. In the last case rank 3
sleeps where it should all-reduce.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.trainer.errors import UserError
from megatron.trainer.health import preflight, rank_checks
from megatron.trainer.runtime.launch import initialize, run_main
from moe_app.pretrain.config import parse_recipe
from tests.distributed.launcher import flags

TIMEOUT_S = 4.0
LAYOUT = {"tensor-model-parallel-size": 2, "expert-model-parallel-size": 2}


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def older_torch(name: str) -> str:
    return "2.10.0" if name == "torch" else "1.0"


def wrong_product(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def multiply(*arguments: torch.Tensor) -> torch.Tensor:
        product = original(*arguments)
        product[3, 5] += 1.0
        return product

    return multiply


def sleep_in_data(*_arguments: object, **_named: object) -> None:
    time.sleep(600)


def main() -> None:
    out = Path(sys.argv[1])
    ctx = initialize(parse_recipe(flags(**LAYOUT), prog="worker", description=""))
    rank, mm, clock = ctx.rank, torch.mm, time.time
    preflight._SHARING_TIME_S = 0.5
    own = out / f"disk{rank // 2}"
    own.mkdir(exist_ok=True)
    nothing = (preflight, "_STATUS", 2)
    # By name: the rank that is hit, what is other than it should be there, and where it saves.
    cases: dict[str, tuple[int, tuple[Any, str, Any], Path]] = {
        "healthy": (0, nothing, out / "run" / "a"),
        "versions": (1, (rank_checks.metadata, "version", older_torch), out),
        "clock": (3, (preflight.time, "time", lambda: clock() + 90.0), out),
        "product": (2, (torch, "mm", wrong_product(mm)), out),
        "sum": (1, (rank_checks, "_share", lambda r: 5.0 if r == 1 else r % 97 + 1.0), out),
        "unwritable": (0, nothing, Path("/proc/run")),
        "other_disk": (0, nothing, own / "run"),
    }
    with changed(rank_checks.socket, "gethostname", lambda: f"n{rank // 2}"):
        for name, (victim, fault, save) in cases.items():
            try:
                with changed(*fault if rank == victim else nothing):
                    said: Any = preflight.preflight(ctx, timeout_s=60.0, save=save)
            except UserError as error:
                said = {"error": str(error)}
            (out / f"{name}.rank{rank}.json").write_text(json.dumps(said))
        print(f"hang begins {time.time()}", flush=True)
        if rank == 3:
            rank_checks.dist.all_reduce = sleep_in_data
        preflight.preflight(ctx, timeout_s=TIMEOUT_S, save=None)


if __name__ == "__main__":
    sys.exit(run_main(main))
