"""Takes clocked training steps in the ranks of a launch, of which one is slow.

Usage: torchrun ... worker_stragglers.py CASES.json OUT

CASES.json: [{"name": ..., "flags": [...]}]. Both ranks sleep in every forward pass, rank 1 longer.
OUT/NAME.json gets what the clock says, and how long each rank slept and computed. On a crowded
machine a rank waits for a core too, which no clock of its own tells from work: up to three times,
until both agree.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.trainer.health.stragglers import BusyClock
from megatron.trainer.objective import NEXT_TOKEN, TokenObjective
from megatron.trainer.runtime.collective import broadcast
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe

SLEEP_S = (0.3, 1.0)
TRIES = 3
TOLERANCE = 0.35
"""Relative, of how slow the slow rank is."""


def agree(found: dict[str, float], truth: list[float]) -> bool:
    """Whether a clock says what the ranks were busy."""
    ratio = truth[1] / truth[0]
    return (
        found.get("straggler_rank") == 1
        and abs(found["straggler_ratio"] - ratio) <= TOLERANCE * ratio
    )


def run_case(flags: list[str], out: Path, name: str) -> None:
    cfg = parse_recipe(flags, prog="worker", description="")
    ctx = initialize(cfg)
    state = build_state(cfg, ctx)
    slept: list[float] = []

    class Sleeping(TokenObjective):
        def forward(self, *arguments: Any) -> Any:
            started = time.perf_counter()
            time.sleep(SLEEP_S[ctx.rank])
            slept.append(time.perf_counter() - started)
            return super().forward(*arguments)

    train_step(state, NEXT_TOKEN)  # the first one is slower
    clock = BusyClock(ctx.device)
    nothing = clock.reduce()
    for _ in range(TRIES):
        slept.clear()
        computed_s = 0.0
        for _ in range(2):
            before = time.thread_time()
            with clock:
                train_step(state, Sleeping())
            computed_s += time.thread_time() - before
        truth: list[Any] = [None] * ctx.world_size
        dist.all_gather_object(truth, (computed_s + sum(slept)) / 2)
        found = clock.reduce()
        if broadcast(agree(found, truth)):
            break
    methods = vars(dist.ProcessGroup)["allreduce"]
    if ctx.rank == 0:
        case = {"found": found, "truth": truth, "nothing": nothing, "again": clock.reduce()}
        (out / f"{name}.json").write_text(json.dumps(case))
    else:
        clock.reduce()
    assert "straggler" not in repr(methods), "the methods of torch are as they were"
    shut_down(keep_world=True)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    torch.set_num_threads(1)
    for case in cases:
        run_case(case["flags"], out, case["name"])


if __name__ == "__main__":
    main()
