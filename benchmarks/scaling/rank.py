"""Runs a rank of the processes sweep: trains a few steps under each requested layout.

    torchrun ... -m benchmarks.scaling.rank SOCKET

Connects to SOCKET, sends its rank, and replies to each request until the other side disconnects.
It is idle while another world is visited.
"""

import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Client
from typing import Any

import torch

from benchmarks.collectives import named_groups, recording
from megatron.trainer.config.parallel_layout import num_microbatches
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.runtime.launch import RunContext, environment_rank, initialize, shut_down
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.cost.rank import Batch
from moe_ext.cost.traffic import step_collectives


def main() -> None:
    """Serve requests until the other side disconnects."""
    connection = Client(sys.argv[1], family="AF_UNIX")
    connection.send(environment_rank())
    while True:
        try:
            flags, steps = connection.recv()
        except EOFError:
            break
        try:
            connection.send(("done", visit(flags, steps)))
        except Exception:
            # The other side raises it.
            connection.send(("failed", traceback.format_exc()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def visit(flags: Sequence[str], steps: int) -> dict[str, Any]:
    """Build a new model, run one recorded step, then `steps` timed ones.

    Returns:
        loss of the recorded step; seconds of each timed step; calls and payload bytes of the
        collectives, recorded and modelled; modelled wire_bytes.
    """
    cfg = parse_recipe(list(flags), prog="scaling", description="")
    ctx = initialize(cfg)
    state = build_state(cfg, ctx)
    with recording(named_groups(ctx.groups)) as calls:
        loss = train_step(state, NEXT_TOKEN).loss
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        train_step(state, NEXT_TOKEN)
        seconds.append(time.perf_counter() - started)
    modelled = modelled_traffic(cfg, ctx)
    shut_down(keep_world=True)
    return {
        "loss": loss,
        "seconds": seconds,
        "calls": sum(calls.values()),
        "bytes": sum(call.payload_bytes * number for call, number in calls.items()),
        **modelled,
    }


def modelled_traffic(cfg: PretrainConfig, ctx: RunContext) -> dict[str, float]:
    """Compute this rank's communication in a step with `moe_ext.cost.traffic`."""
    training = cfg.training
    found = step_collectives(
        cfg.model,
        ctx.layout,
        Batch(
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            num_microbatches=num_microbatches(training, ctx.layout),
            bf16=training.bf16,
            use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
            device_type="cpu",
        ),
        stage=ctx.groups.pp.rank(),
    )
    return {
        "modelled_calls": sum(each.count for each in found),
        "modelled_bytes": sum(each.count * each.payload_bytes for each in found),
        "wire_bytes": sum(each.step_bytes for each in found),
    }


if __name__ == "__main__":
    main()
