"""Valid checkpoints are found among damaged ones, in a world of one."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
)

from megatron.trainer.checkpoint import (
    find,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.trainer.checkpoint.manifest import verify_manifest
from megatron.trainer.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
SHARD = "__0_0.distcp"


def make_state(value: float) -> dict[str, Any]:
    weight = ShardedTensor.from_rank_offsets("model.w", torch.full((3, 4), value))
    return {"w": weight, "iteration": int(value)}


def save(root: Path, iteration: int, **kwargs: Any) -> Path:
    return save_checkpoint(root, iteration, make_state(iteration), **kwargs)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project logged as a warning; torch's own loggers talk too."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("megatron.trainer") and record.levelno == logging.WARNING
    ]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_find_takes_what_the_tracker_names_not_the_newest(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("10")
    found = find_checkpoint(tmp_path)
    assert (found.path, found.iteration, found.skipped) == (tmp_path / "iter_0000010", 10, ())


def test_damage_after_a_roll_back_does_not_lead_into_what_was_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (10, 20, 30):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("20")
    flip_bit(tmp_path / "iter_0000020" / SHARD)
    assert find_checkpoint(tmp_path).iteration == 10
    # Nor does a bound, whatever the tracker names.
    (tmp_path / TRACKER).write_text("30")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, upto=29).iteration == 10
    assert told(caplog)[-3] == (
        f"{TRACKER} names iteration 30, which is later than 29; taking the newest valid checkpoint,"
        " iteration 10"
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, f"{TRACKER} is missing"),
        ("", f"{TRACKER} holds '', not an iteration"),
        ("20\x00\x00", f"{TRACKER} holds '20\\x00\\x00', not an iteration"),
        ("release", f"{TRACKER} holds 'release', not an iteration"),
        ("30", f"{TRACKER} names iteration 30, which is not there"),
    ],
)
def test_bad_tracker_falls_back_to_the_newest_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None, complaint: str
) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).unlink()
    if content is not None:
        (tmp_path / TRACKER).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).iteration == 20
    assert told(caplog) == [f"{complaint}; taking the newest valid checkpoint, iteration 20"]


def damage_missing(path: Path) -> str:
    (path / SHARD).unlink()
    return f"{SHARD} is missing"


def damage_bit(path: Path) -> str:
    flip_bit(path / SHARD)
    return f"{SHARD} has changed: its SHA-256 is not the manifest's"


def damage_size(path: Path) -> str:
    size = (path / SHARD).stat().st_size
    os.truncate(path / SHARD, 0)
    return f"{SHARD} has 0 bytes, the manifest says {size}"


def damage_extra(path: Path) -> str:
    (path / "__1_0.distcp").write_bytes(b"x")
    return "__1_0.distcp is not in the manifest"


def damage_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing: saving never finished"


def damage_iteration(path: Path) -> str:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "iter_0000010", path)
    return "manifest.json says iteration 10"


DAMAGES = [
    damage_missing,
    damage_bit,
    damage_size,
    damage_extra,
    damage_manifest,
    damage_iteration,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    save(tmp_path, 10)
    bad = save(tmp_path, 20)
    problem = damage(bad)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(tmp_path)
    assert found.iteration == 10
    assert found.skipped == ((bad, (problem,)),)
    assert told(caplog) == [
        f"skipped {bad}: {problem}",
        "continuing from iteration 10, not 20: the steps between are lost",
    ]
    assert load_checkpoint(found.path, make_state(0))["iteration"] == 10


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_asked_for_by_number_is_refused(tmp_path: Path, damage: Any) -> None:
    save(tmp_path, 10)
    problem = damage(save(tmp_path, 20))
    message = (
        f"the checkpoint of iteration 20 in {tmp_path} is damaged (iter_0000020: {problem}); ask "
        "for another with --ckpt-step, or leave --ckpt-step out to take the newest valid one"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        find_checkpoint(tmp_path, iteration=20)


def test_missing_shard_is_refused_by_load_too(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    (path / SHARD).unlink()
    message = f"{path} is damaged: {SHARD} is missing; take another checkpoint with --ckpt-step"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path, make_state(0))


def test_number_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save(tmp_path, iteration)
    message = f"{tmp_path} has no checkpoint of iteration 15; it has 10, 20"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        find_checkpoint(tmp_path, iteration=15)


def test_directories_without_checkpoints_say_what_to_give_instead(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(CheckpointError, match=re.escape(f"no checkpoint in {absent}: no such")):
        find_checkpoint(absent)
    with pytest.raises(CheckpointError, match="it has no directory iter_NNNNNNN; give --load the"):
        find_checkpoint(tmp_path)
    path = save(tmp_path, 10)
    with pytest.raises(
        CheckpointError,
        match=re.escape(f"{path} is a checkpoint itself; give --load the directory"),
    ):
        find_checkpoint(path)
    flip_bit(path / SHARD)
    with pytest.raises(CheckpointError, match=re.escape(f"no valid checkpoint in {tmp_path} (")):
        find_checkpoint(tmp_path)


def test_checkpoint_set_aside_by_a_dead_save_is_found_and_moved_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, 10)
    aside = path.rename(tmp_path / "iter_0000010.replaced-0123abcd")
    assert find_checkpoint(tmp_path).path == aside
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 20)
    assert told(caplog) == [
        f"moved {aside} back to iter_0000010: a save was killed while replacing it"
    ]
    assert find_checkpoint(tmp_path, iteration=10).path == path


def test_leftovers_of_dead_saves_are_removed_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    half = tmp_path / "iter_0000020.tmp-0123abcd"
    half.mkdir()
    (half / "common.pt").write_bytes(b"x")
    foreign = tmp_path / "iter_0000020.tmp-mine.bak"
    foreign.mkdir()
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 30)
    assert not half.exists()
    assert foreign.exists()
    assert told(caplog) == [f"removing {half}: the save that wrote it did not finish"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "manifest.json cannot be read"),
        ("[]", "manifest.json has format version None, this program reads 1"),
        ('{"format_version": 2}', "manifest.json has format version 2, this program reads 1"),
        ('{"format_version": 1}', "manifest.json lacks `iteration` or `files`"),
        (
            '{"format_version": 1, "iteration": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
            "manifest.json has a bad entry for '../x'",
        ),
    ],
)
def test_manifest_that_is_not_one_is_a_problem(
    tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (problem,) = verify_manifest(tmp_path, checksums=True)
    assert problem.startswith(complaint)


def test_shares_of_the_ranks_cover_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 10, files={"config.yaml": "x"})
    flip_bit(path / SHARD)
    monkeypatch.setattr(find, "size_of", lambda _: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(find, "rank_of", lambda _, rank=rank: rank)
        found.append(find._examine(path, 10, None, compare_contents=True))
    assert sorted(found) == [[], [f"{SHARD} has changed: its SHA-256 is not the manifest's"]]
