"""Begins runs in the ranks that torchrun started, one of which has an outdated view of the files.

Usage: torchrun ... worker_stale.py CASES.json OUT

CASES.json: [{"name", "flags", "victim", "directory", "hidden", "view", ...}]:
the rank `victim` does not see the entries `hidden` of `directory`, and gets `more_flags`, or other
content under `--data-path` (`other_data`). For each case OUT/NAME.rankR.json says how rank R began,
or {"error": ...}; where the case `counts_reads`, also how often each rank read an index through.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.data import index_file, indexed
from megatron.trainer.data.index_file import IndexHeader
from megatron.trainer.errors import UserError
from megatron.trainer.resume import (
    check_directories,
    checkpoint_writer,
    evaluation_is_pending,
    resume,
    rewind,
)
from megatron.trainer.runtime.collective import gather
from megatron.trainer.runtime.launch import environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from tests.distributed.stale import hidden


@contextlib.contextmanager
def counted_reads() -> Iterator[list[str]]:
    """Note every index that this rank reads through."""
    read: list[str] = []

    def noted(header: IndexHeader, digest: Any) -> int:
        read.append(header.path.name)
        return index_file.sum_lengths(header, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "sum_lengths", noted)
        yield read


def begin(case: dict[str, Any]) -> dict[str, Any]:
    is_victim = environment_rank() == case["victim"]
    more = case.get("more_flags", []) if is_victim else []
    cfg = parse_recipe([*case["flags"], *more], prog="worker", description="")
    ctx = initialize(cfg)
    with contextlib.ExitStack() as stack:
        if is_victim:
            view = hidden(Path(case["directory"]), case["hidden"], view=case["view"])
            stack.enter_context(view)
            if "other_data" in case:
                data = dataclasses.replace(cfg.data, data_path=(case["other_data"],))
                cfg = dataclasses.replace(cfg, data=data)
        reads = stack.enter_context(counted_reads())
        check_directories(cfg)
        state = build_state(cfg, ctx)
        beginning = resume(state, cfg.model)
        checkpoint_writer(state)
        found = {
            "event": beginning.event,
            "iteration": state.iteration,
            "pending": beginning.is_continued and evaluation_is_pending(state),
        }
        if "counts_reads" in case:
            found["reads"] = gather(len(reads))
        if "rewind" in case:
            found["rewound"] = rewind(state, case["rewind"])
            found["iteration"] = state.iteration
        return found


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    for case in cases:
        try:
            found = begin(case)
        except UserError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        (out / f"{case['name']}.rank{environment_rank()}.json").write_text(json.dumps(found))
        shut_down(keep_world=True)


if __name__ == "__main__":
    main()
