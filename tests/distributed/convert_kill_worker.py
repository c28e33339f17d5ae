"""Kill conversions of a tiny checkpoint at chosen moments, and report what each left.

Usage: convert_kill_worker.py WORK

Prints a JSON object a line: the moment, the status, whether readers accept the result as valid,
and whether the next conversion succeeds. Each conversion runs in a forked child.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.trainer.checkpoint import find_checkpoint, layout, stream_write
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory, HFWriter, publish
from moe_app.convert import convert_checkpoint
from tests.distributed.convert_models import make_hf

IMPORTS: dict[str, tuple[Any, str, int]] = {
    "first block": (stream_write.CheckpointStream, "write", 1),
    "20th block": (stream_write.CheckpointStream, "write", 20),
    "before the metadata": (stream_write.CheckpointStream, "_write_metadata", 1),
    "before the manifest": (stream_write, "write_manifest", 1),
    "before the rename": (layout, "publish", 1),
    "before the tracker": (layout, "write_tracker", 1),
}
EXPORTS: dict[str, tuple[Any, str, int]] = {
    "first rows": (HFWriter, "write", 1),
    "20th rows": (HFWriter, "write", 20),
    "before the index": (HFWriter, "finish", 1),
    "before the rename": (publish, "sync_directory", 1),
}


def kill_at_call(owner: Any, name: str, count: int) -> None:
    """Make the process kill itself at the `count`th call."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def run_in_child(work: Callable[[], int]) -> int:
    """Return the exit status of `work` in a fork, negative for a signal."""
    child = os.fork()
    if child == 0:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_valid_run(root: Path) -> bool:
    try:
        find_checkpoint(root)
    except CheckpointError:
        return False
    return True


def is_valid_hf(path: Path) -> bool:
    try:
        with HFDirectory(path):
            return True
    except CheckpointError:
        return False


def main(work: Path) -> None:
    source, _ = make_hf(work / "hf", "olmoe", "per-expert")
    run, out = work / "run", work / "out"
    importing = ["import", "--hf", str(source), "--save", str(run)]
    exporting = ["export", "--load", str(run), "--hf", str(out), "--max-shard-size", "20KB"]

    def convert(arguments: list[str], moment: tuple[Any, str, int] | None = None) -> int:
        def work_of_child() -> int:
            if moment is not None:
                kill_at_call(*moment)
            return convert_checkpoint.main(arguments)

        return run_in_child(work_of_child)

    def report(command: str, moment: str, status: int, valid: bool, again: int) -> None:
        said = {"command": command, "moment": moment, "status": status}
        print(json.dumps({**said, "valid": valid, "again": again}), flush=True)

    for moment, place in IMPORTS.items():
        status = convert(importing, place)
        report("import", moment, status, is_valid_run(run), convert(importing))
        assert is_valid_run(run)
        shutil.rmtree(run)
    convert(importing)
    for moment, place in EXPORTS.items():
        status = convert(exporting, place)
        valid = is_valid_hf(out)
        report("export", moment, status, valid, convert(exporting))
        assert is_valid_hf(out)
        shutil.rmtree(out)
    print(json.dumps({"left": sorted(os.listdir(work))}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
