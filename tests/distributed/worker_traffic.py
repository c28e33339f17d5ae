"""Record one training step of each case, in the ranks that torchrun started.

Usage: torchrun ... worker_traffic.py CASES.json OUT

CASES.json: [{"name": ..., "flags": [...]}]. For each case OUT/NAME.rankR.json gets every rank's
collectives: [kind, group, payload bytes, calls]. The step ends with a record of the routers.
OUT/NAME.tail.rankR.json gets where the step's host waited for its device, and its gradient norm by
`optim.update` and by megatron-core.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.collectives import named_groups, recording
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.optim.update import norm_of, squared_norms
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from moe_ext.routers import MoERouter, Routing, register_router
from tests.reads import ReadCounter


class RoundRobinRouter(MoERouter):
    """Sends token i to the k experts from i * k on, so that all get the same number of tokens."""

    def select(self, logits: Tensor) -> Routing:
        num_tokens, num_experts = logits.shape
        slots = torch.arange(num_tokens * self.topk).view(num_tokens, self.topk)  # [t, k]
        experts = slots % num_experts
        scores = logits.float().softmax(dim=-1)  # [t, e]
        return Routing(experts=experts, gates=scores.gather(1, experts), scores=scores)


def run_case(flags: list[str], out: Path, name: str) -> None:
    cfg = parse_recipe(flags, prog="worker", description="")
    ctx = initialize(cfg)
    state = build_state(cfg, ctx)
    with recording(named_groups(ctx.groups)) as calls:
        with ReadCounter() as reads:
            train_step(state, NEXT_TOKEN)
        if state.metrics is not None:
            state.metrics.reduce()
    rows = [[*call, number] for call, number in sorted(calls.items())]
    (out / f"{name}.rank{ctx.rank}.json").write_text(json.dumps(rows))
    norms = [
        norm_of(squared_norms(state.optimizer, ctx.device).tolist()),
        float(state.optimizer.get_grad_norm()),
    ]
    tail = {"reads": reads.sites, "norms": norms}
    (out / f"{name}.tail.rank{ctx.rank}.json").write_text(json.dumps(tail))
    shut_down(keep_world=True)


def run_cases(run: Callable[[list[str], Path, str], None]) -> None:
    """Run the cases of the command line, with the router above registered."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    register_router("round_robin", RoundRobinRouter)
    for case in cases:
        run(case["flags"], out, case["name"])


if __name__ == "__main__":
    run_cases(run_case)
