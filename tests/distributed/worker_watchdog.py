"""Ranks that step together under a watchdog, without a model, until a fault befalls one of them.

Usage: torchrun ... worker_watchdog.py FAULT RANK OUT

First comes what must not be taken for a hang: steps shorter than the time-out, then, unless FAULT
is `stop` or has been, one twice as long, of products and collectives within one stage. FAULT then
befalls rank RANK in step 6: `stop` freezes its process, `sleep` lets it sleep while it reads data,
once; `none` never happens. Writes
OUT/rankR.pid and, when the fault begins, OUT/fault with the time.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.trainer.health.watchdog import Watchdog
from megatron.trainer.runtime.rendezvous import rendezvous

TIMEOUT_S = 2.0
STEPS = 8


def read_data(fault: str, out: Path) -> None:
    """Where one rank is hit."""
    if (out / "fault").exists():
        return
    (out / "fault").write_text(str(time.time()))
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def long_step() -> None:
    end, counted = time.monotonic() + 2 * TIMEOUT_S, torch.zeros(1)
    matrix = torch.ones(200, 200)
    while not counted.item():
        for _ in range(20):
            torch.mm(matrix, matrix)
        counted.fill_(time.monotonic() > end)
        dist.all_reduce(counted, op=dist.ReduceOp.MAX)


def main() -> None:
    fault, victim, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    timeout = timedelta(seconds=60)
    store, rank, world_size = rendezvous(timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    (out / f"rank{rank}.pid").write_text(str(os.getpid()))
    watchdog = Watchdog(rank=rank, world_size=world_size, timeout_s=TIMEOUT_S)
    watchdog.start()
    for iteration in range(1, STEPS + 1):
        watchdog.on_stage("data", iteration)
        if fault != "none" and iteration == 6 and rank == victim:
            read_data(fault, out)
        watchdog.on_stage("train", iteration)
        if iteration == 3 and fault != "stop" and not (out / "fault").exists():
            long_step()
        time.sleep(0.1)
        dist.all_reduce(torch.ones(1))
    watchdog.stop()
    dist.destroy_process_group()
    print("finished", flush=True)


if __name__ == "__main__":
    main()
