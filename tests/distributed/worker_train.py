"""Runs training cases one after another in the ranks that torchrun started.

Usage: torchrun ... worker_train.py CASES.json OUT

CASES.json: [{"name": ..., "flags": [...], "bucket_size": ...}]. For each case OUT/NAME.json gets
rank 0's records and OUT/NAME.rankR.pt every rank's shards of the final weights: (key, global shape,
offset, tensor). A case that ends in a UserError gets {"error": ...} instead.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig

from megatron.trainer.errors import UserError
from megatron.trainer.hooks.base import Hook
from megatron.trainer.hooks.journal import open_journal
from megatron.trainer.loop import Upkeep, train
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.optim import wrap
from megatron.trainer.records.record_file import Record
from megatron.trainer.resume import checkpoint_writer, resume, rewind
from megatron.trainer.runtime.collective import on_all_ranks
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from megatron.trainer.state import TrainState
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from moe_app.pretrain.hooks import build_hooks
from tests.distributed import flex_stand_in


class Recorder(Hook):
    """Keeps what the loop reports."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_log(self, record: Record) -> None:
        self.records.append(record)

    on_evaluation = on_log


def run_case(flags: list[str], out: Path, name: str) -> None:
    cfg = parse_recipe(flags, prog="worker", description="")
    ctx = initialize(cfg)
    journal = on_all_ranks(
        "opening the run directory",
        lambda: open_journal(
            cfg.checkpoint.save, rank=ctx.rank, train_iters=cfg.training.train_iters
        ),
    )
    recorder = Recorder()
    with journal.recording_errors():
        state = build_state(cfg, ctx)
        resume(state, cfg.model)
        train(
            state,
            NEXT_TOKEN,
            hooks=[journal, recorder, *build_hooks(cfg, state)],
            upkeep=Upkeep(save=checkpoint_writer(state), rewind=rewind),
        )
    torch.save(final_shards(state), out / f"{name}.rank{ctx.rank}.pt")
    if ctx.rank == 0:
        (out / f"{name}.json").write_text(json.dumps(recorder.records))
    shut_down(keep_world=True)


def final_shards(state: TrainState) -> list[tuple[str, list[int], list[int], torch.Tensor]]:
    shards = []
    for module in state.modules:
        for value in nested_values(module.sharded_state_dict()):  # type: ignore[operator]
            built = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in nested_values({"part": built}):
                if isinstance(part, ShardedTensor):
                    tensor = part.data.detach().clone()
                    while tensor.dim() < len(part.global_shape):
                        tensor = tensor[None]
                    shards.append(
                        (part.key, list(part.global_shape), list(part.global_offset), tensor)
                    )
    return shards


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    for case in cases:
        wrap.DistributedDataParallelConfig = partial(
            DistributedDataParallelConfig, bucket_size=case["bucket_size"]
        )
        if "flex" in case["flags"]:
            flex_stand_in.install()
        try:
            run_case(case["flags"], out, case["name"])
        except UserError as error:
            if environment_rank() == 0:
                (out / f"{case['name']}.json").write_text(json.dumps({"error": str(error)}))
            shut_down(keep_world=True)


if __name__ == "__main__":
    main()
