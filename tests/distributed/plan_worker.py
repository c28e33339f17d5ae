"""Measure what tensors of each rank hold in one training step of each case.

Usage: torchrun ... plan_worker.py CASES.json OUT

CASES.json: [{"name": ..., "flags": [...]}]. For each case OUT/NAME.rankR.json gets the bytes of
weights, gradients and optimizer, and what each forward pass keeps for its backward pass.
"""

import json
from pathlib import Path

from benchmarks.held import Kept, state_bytes
from megatron.trainer.runtime.launch import initialize, shut_down
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from tests.distributed.worker_traffic import run_cases


def run_case(flags: list[str], out: Path, name: str) -> None:
    cfg = parse_recipe(flags, prog="worker", description="")
    ctx = initialize(cfg)
    state = build_state(cfg, ctx)
    kept = Kept(state)
    train_step(state, kept)
    found = {"state": state_bytes(state), "passes": kept.passes, "highest": kept.highest}
    (out / f"{name}.rank{ctx.rank}.json").write_text(json.dumps(found))
    shut_down(keep_world=True)


if __name__ == "__main__":
    run_cases(run_case)
