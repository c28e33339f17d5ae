"""Opens the data of a run on a rank of the start-up's benchmark, and records time and memory.

    torchrun ... -m benchmarks.index_startup_rank OUT FLAG...

Writes OUT/rankR.json.
"""

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from benchmarks.memory import PeakMemory, resident_bytes
from megatron.trainer.data.source import WindowSource
from megatron.trainer.runtime.collective import on_rank0
from megatron.trainer.runtime.launch import initialize, shut_down
from moe_app.pretrain.build import check_data, document_rule, open_data
from moe_app.pretrain.config import parse_recipe

_WINDOWS = 1000


def main() -> None:
    """Measure the start that the command line describes."""
    out, flags = Path(sys.argv[1]), sys.argv[2:]
    cfg = parse_recipe(flags, prog="index_startup", description="")
    ctx = initialize(cfg)
    documents = document_rule(cfg.data, cfg.model.vocab_size)
    memory = PeakMemory(ctx.device)
    dist.barrier()
    memory.restart()
    own = resident_bytes("RssAnon")
    started = time.perf_counter()
    data = open_data(cfg, ctx, documents)
    on_rank0("checking the data", lambda: check_data(cfg, data, documents))
    figures = {
        "seconds": time.perf_counter() - started,
        "peak_bytes": memory.peak_bytes(),
        "own_bytes": resident_bytes("RssAnon") - own,
    }
    (source,) = data.train.sources
    assert isinstance(source, WindowSource)
    step = source.num_windows // _WINDOWS
    started = time.perf_counter()
    for n in range(_WINDOWS):
        source.read_starts(n * step)
    figures["window_us"] = (time.perf_counter() - started) / _WINDOWS * 1e6
    (out / f"rank{ctx.rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    shut_down()


if __name__ == "__main__":
    main()
