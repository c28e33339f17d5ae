"""Two steps on given batches whose micro-batches count unequal numbers of tokens.

Usage: torchrun ... masks_worker.py CASES.json OUT.json

CASES.json: {name: flags}. Rank 0 writes {name: [[loss, gradient norm], ...]}.
"""

import json
import sys
from pathlib import Path

import torch

from megatron.trainer.data.batch import Batch, make_batch, split_global_batch
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from tests.distributed.launcher import TINY


class UnequalSamples(SampleStream):
    """Samples of which each counts another number of tokens."""

    def __init__(self, stream: SampleStream) -> None:
        vars(self).update(vars(stream))
        self._generator = torch.Generator().manual_seed(3)

    def next_global_batch(self, **sizes: int) -> list[Batch]:
        number, length = sizes["global_batch_size"], int(TINY["seq-length"])
        windows = torch.randint(0, 120, (number, length + 1), generator=self._generator).numpy()
        counted = torch.arange(length) < torch.tensor([1, 2, 16, 3, 5, 1, 9, 4])[:, None]
        parts = [slice(part.start, part.stop) for part in split_global_batch(**sizes)]
        return [
            Batch(**{**vars(make_batch(list(windows[part]))), "loss_mask": counted[part].float()})
            for part in parts
        ]


def steps_of(flags: list[str]) -> list[list[float]]:
    cfg = parse_recipe(flags, prog="worker", description="")
    state = build_state(cfg, initialize(cfg))
    state.train_data = UnequalSamples(state.train_data)
    steps = [train_step(state, NEXT_TOKEN) for _ in range(2)]
    shut_down(keep_world=True)
    return [[step.loss, step.grad_norm] for step in steps]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: steps_of(flags) for name, flags in cases.items()}
    if environment_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
