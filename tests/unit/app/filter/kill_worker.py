"""Kills runs of the filter command at one write after another, and compares what restarts make.

Started as a process of its own, which forks: the kills end real processes.
"""

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.io import DataFolder

from moe_app.filter.filter_data import main
from moe_app.filter.pipeline import exact_duplicates, near_duplicates
from tests.unit.app import kill_at_write

SKIPPED = 9
"""Writes between two kills."""
WRITES = (
    (os, "replace"),
    (PipelineExecutor, "mark_rank_as_completed"),
    (DataFolder, "open"),
    (exact_duplicates, "save_array"),
    (near_duplicates, "save_array"),
)


def tree(output: Path) -> dict[str, str]:
    """Return digests of all that a finished run leaves, apart from logs."""
    names = [path for path in output.rglob("*") if path.is_file() and "stages" not in path.parts]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in names
    }


def run(command: list[str], kill: int | None = None) -> int:
    """Run the command in a child; return its exit status."""
    return kill_at_write.run(main, command, kill=kill, owners=WRITES)


class Doomed:
    """Stands for the executor of a stage whose second task runs out of memory."""

    def run_task(self, rank: int) -> None:
        """End the process as the kernel does."""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_kills(output: Path, command: list[str]) -> None:
    """Print how many kills there were; fail where a restart makes other bytes."""
    assert run(command) == 0
    wanted = tree(output)
    kills = 0
    for write in range(1, 10_000, SKIPPED):
        shutil.rmtree(output)
        if run(command, write) == 0:
            break
        kills += 1
        assert not (output / "summary.json").exists() or tree(output).keys() >= wanted.keys()
        assert run(command) == 0
        assert tree(output) == wanted, write
    print(kills, "kills")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    test_kills(place, ["--output", str(place), *sys.argv[2:]])
