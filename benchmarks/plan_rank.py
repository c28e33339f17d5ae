"""Runs two steps on a rank of the planner's benchmark and records their memory.

    torchrun ... -m benchmarks.plan_rank OUT FLAG...

Writes OUT/rankR.json with the measured memory and the prediction of `moe_ext.cost.footprint`.
Memory is measured twice: with each tensor in its own pages, which return to the system when it is
freed; and with the trainer's setting, which keeps freed memory for the next tensor.
"""

import ctypes
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.held import state_bytes
from benchmarks.memory import PeakMemory
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.runtime.launch import environment_world_size, initialize, shut_down
from megatron.trainer.runtime.malloc import keep_freed_memory
from megatron.trainer.step import train_step
from moe_app.planner.search import make_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from moe_ext.cost.footprint import stage_footprint
from moe_ext.routers import MoERouter, Routing, register_router

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_SMALL = {
    "hidden-size": 64,
    "kv-channels": 16,
    "moe-ffn-hidden-size": 32,
    "vocab-size": 256,
    "seq-length": 64,
}


class BalancedRouter(MoERouter):
    """Routes token i to the k experts from i * k on, so that every expert gets as many tokens."""

    def select(self, logits: Tensor) -> Routing:
        """Selects those experts, weighted by their probabilities."""
        num_tokens, num_experts = logits.shape
        slots = torch.arange(num_tokens * self.topk).view(num_tokens, self.topk)  # [t, k]
        experts = slots % num_experts
        scores = logits.softmax(dim=-1, dtype=torch.float32)  # [t, e]
        return Routing(experts=experts, gates=scores.gather(1, experts), scores=scores)


def main() -> None:
    """Measure the run that the command line describes."""
    out, flags = Path(sys.argv[1]), sys.argv[2:]
    register_router("balanced", BalancedRouter)
    # Excludes what the first step of a process loads and compiles.
    visit(_shrunk(flags), give_back_freed_memory)
    found = visit(flags, give_back_freed_memory)
    found["as_trained"] = visit(flags, keep_freed_memory)["resident"]
    (out / f"rank{found['rank']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def give_back_freed_memory() -> None:
    """Return freed memory to the system at once, unlike `keep_freed_memory`."""
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 1 << 20)
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    library.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def visit(flags: Sequence[str], set_allocator: Callable[[], None]) -> dict[str, Any]:
    """Build a model and run two steps; on a single rank, profile a third one."""
    cfg = parse_recipe(list(flags), prog="plan", description="")
    ctx = initialize(cfg)
    set_allocator()
    ctypes.CDLL(None).malloc_trim(0)
    memory = PeakMemory(ctx.device)
    memory.restart()
    state = build_state(cfg, ctx)
    for _ in range(2):
        train_step(state, NEXT_TOKEN)
    resident = memory.peak_bytes()
    held = state_bytes(state)
    allocated = None
    if environment_world_size() == 1 and set_allocator is give_back_freed_memory:
        # The profiler does not see what a collective's thread frees.
        grown = largest_growth(lambda: train_step(state, NEXT_TOKEN))
        allocated = sum(held.values()) + grown
    step = make_step(cfg, ctx.layout, device_type="cpu")
    on_paper = stage_footprint(cfg.model, ctx.layout, step, stage=ctx.groups.pp.rank())
    shut_down(keep_world=True)
    return {
        "rank": ctx.rank,
        "resident": resident,
        "held": held,
        "allocated": allocated,
        "footprint": {**dataclasses.asdict(on_paper), "peak": on_paper.peak},
    }


def largest_growth(action: Callable[[], object]) -> int:
    """Return the peak growth of the bytes that torch's CPU allocator has in use."""
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        action()
    assert profile.kineto_results is not None
    events = [each for each in profile.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _shrunk(flags: Sequence[str]) -> list[str]:
    """Return the flags of the same run with a tiny model."""
    found = list(flags)
    for name, value in _SMALL.items():
        if f"--{name}" in found:
            found[found.index(f"--{name}") + 1] = str(value)
    return found


if __name__ == "__main__":
    main()
