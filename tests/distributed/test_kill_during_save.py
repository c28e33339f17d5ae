"""A rank killed at any moment of a save costs that save and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import alone

WORKER = Path(__file__).with_name("kill_during_save_worker.py")


def run_worker(mode: str, root: Path) -> list[dict[str, Any]]:
    """What the worker printed, an object a line."""
    done = alone(WORKER, mode, str(root), "20240607", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_worker("kill", tmp_path_factory.mktemp("kill") / "run")


def test_thirteen_kills_each_leave_a_whole_checkpoint_of_one_save(
    rounds: list[dict[str, Any]],
) -> None:
    assert len(rounds) == 13
    for found in rounds:
        iterations = set(found["found"])
        assert len(iterations) == 1, found  # both ranks agree
        (iteration,) = iterations
        # The last save that returned, or the one that was under way.
        assert iteration in {found["completed"], found["started"]}, found
        # Every shard of both ranks, both objects and the unsharded state are of the same save,
        # also where an earlier checkpoint of this iteration was being replaced.
        assert len(found["values"]) == 1, found
        assert found["values"][0] // 100 == iteration, found


def test_the_kills_happened_where_they_should(rounds: list[dict[str, Any]]) -> None:
    left = {found["moment"]: found for found in rounds}

    def names(moment: str, part: str) -> list[str]:
        return [name for name in left[moment]["left"] if part in name]

    for moment in ("before the shards", "after the shards", "before the manifest"):
        assert names(moment, f"{left[moment]['started']:07d}.tmp-"), left[moment]
    moment = "between rename and tracker"
    assert names(moment, f"{left[moment]['started']:07d}"), left[moment]
    assert left[moment]["found"][0] == left[moment]["completed"] < left[moment]["started"]
    assert names("before the tracker is replaced", "txt.tmp")
    moment = "between the renames of a replacement"
    aside = names(moment, f"{left[moment]['started']:07d}.replaced-")
    assert aside, left[moment]
    assert aside[0].partition(".")[0] not in left[moment]["left"]


def test_full_disk_on_one_rank_stops_both_and_spares_the_earlier_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (result,) = run_worker("full-disk", root)
    message = (
        f"could not save iteration 2 to {root}: writing the shards failed on rank 1: OSError: "
        "[Errno 28] No space left on device; the checkpoints that were there before are untouched"
    )
    assert result["errors"] == [message, message]
    assert result["left"] == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert result["reports"] == [{"found": 1, "values": [1.0]}] * 2
