"""Saving and loading checkpoints in a world of one. Two ranks: tests/distributed."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron.trainer.checkpoint import (
    compare_configs,
    config_mismatch,
    find_checkpoint,
    layout,
    load_checkpoint,
    read_text,
    save_checkpoint,
)
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.io.atomic_write import temporary_path

TRACKER = "latest_checkpointed_iteration.txt"
SHARD = "__0_0.distcp"


def make_state(
    value: float, *, width: int = 4, names: tuple[str, ...] = ("a", "b")
) -> dict[str, Any]:
    """Tensors and an object filled with `value`, and an unsharded iteration."""
    tensors = {
        name: ShardedTensor.from_rank_offsets(f"model.{name}", torch.full((3, width), value))
        for name in names
    }
    rng = {"torch": torch.full((5,), value), "i": torch.tensor([int(value)]).short(), "n": [1]}
    return {
        "model": tensors,
        "rng": ShardedObject("rng_state", rng, (1,), (0,)),
        "iteration": int(value),
    }


def save(root: Path, iteration: int, **kwargs: Any) -> Path:
    return save_checkpoint(root, iteration, make_state(iteration), **kwargs)


def test_loaded_state_equals_the_saved_one_in_values_types_and_shapes(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    target = make_state(0)
    loaded = load_checkpoint(path, target)

    assert loaded["iteration"] == 7
    for name in ("a", "b"):
        assert torch.equal(loaded["model"][name], torch.full((3, 4), 7.0))
    assert torch.equal(loaded["rng"]["torch"], torch.full((5,), 7.0))
    assert loaded["rng"]["i"].dtype == torch.int16
    assert loaded["rng"]["i"].tolist() == [7]
    assert loaded["rng"]["n"] == [1]


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    weight = torch.zeros(3, 4)
    state = make_state(0)
    state["model"]["a"] = ShardedTensor.from_rank_offsets("model.a", weight)
    load_checkpoint(path, state)
    assert torch.equal(weight, torch.full((3, 4), 7.0))


def test_factories_and_nonpersistent_objects_survive_a_round_trip(tmp_path: Path) -> None:
    def build(key: str, tensor: torch.Tensor, replica_id: Any, _range: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(key, half, (0, index, 2), replica_id=replica_id)
            for index, half in enumerate(tensor.chunk(2))
        ]

    def state(tensor: torch.Tensor) -> dict[str, Any]:
        return {
            "w": ShardedTensorFactory("model.w", tensor, build, torch.cat),
            "local": LocalNonpersistentObject("mine"),
        }

    saved = torch.arange(8.0).view(4, 2)
    path = save_checkpoint(tmp_path, 1, state(saved.clone()))
    loaded = load_checkpoint(path, state(torch.zeros(4, 2)))
    assert torch.equal(loaded["w"], saved)
    assert loaded["local"] == "mine"


def test_layout_is_megatrons_plus_manifest_and_given_files(tmp_path: Path) -> None:
    tokenizer = tmp_path / "source.model"
    tokenizer.write_bytes(b"\x00tokens")
    root = tmp_path / "run"
    path = save(root, 100, files={"config.yaml": "lr: 1\n", "tokenizer.model": tokenizer})

    assert path == root / "iter_0000100"
    assert sorted(os.listdir(root)) == ["iter_0000100", TRACKER]
    assert (root / TRACKER).read_text() == "100"
    assert sorted(os.listdir(path)) == [
        ".metadata",
        SHARD,
        "common.pt",
        "config.yaml",
        "manifest.json",
        "metadata.json",
        "tokenizer.model",
    ]
    assert read_text(path, "config.yaml") == "lr: 1\n"
    assert (path / "tokenizer.model").read_bytes() == b"\x00tokens"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["iteration"] == 100
    assert manifest["files"]["tokenizer.model"] == {
        "bytes": 7,
        # sha256sum of the seven bytes
        "sha256": "f225291235926456bbeb4a3d7f16869b1633bafdf830cb6da14bac4bdc916693",
    }


def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name} {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path, 5, files={"config.yaml": "x"})

    attempt = next(e.split()[1] for e in events if e.endswith(" iter_0000005"))
    commit = events.index(f"rename {attempt} iter_0000005")
    before = {e.removeprefix("sync ") for e in events[:commit] if e.startswith("sync ")}
    written = set(os.listdir(tmp_path / "iter_0000005"))
    assert written | {attempt} <= before
    assert events[commit + 1] == f"sync {tmp_path.name}"
    assert events[commit + 2] == f"sync {temporary_path(tmp_path / TRACKER).name}"
    # The manifest is the last file written.
    files = [e for e in events[:commit] if e.removeprefix("sync ") in written]
    assert files[-1] == "sync manifest.json"


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save_checkpoint(tmp_path, 10, make_state(11))
    assert sorted(os.listdir(tmp_path)) == ["iter_0000010", TRACKER]
    assert load_checkpoint(find_checkpoint(tmp_path).path, make_state(0))["iteration"] == 11


def test_keep_last_deletes_older_ones_and_never_later_ones(tmp_path: Path) -> None:
    for iteration in (10, 20, 40):
        save(tmp_path, iteration)
    save(tmp_path, 30, keep_last=2)
    assert layout.final_iterations(tmp_path) == [20, 30, 40]
    assert find_checkpoint(tmp_path).iteration == 30


def test_keep_every_spares_its_multiples(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40, 50):
        save(tmp_path, iteration)
    save(tmp_path, 60, keep_last=2, keep_every=20)
    assert layout.final_iterations(tmp_path) == [20, 40, 50, 60]


def test_nothing_is_deleted_for_a_checkpoint_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The only valid one may be the one before: here a shard goes missing after the rename."""
    save(tmp_path, 10)

    def lose_a_shard(root: Path, iteration: int, attempt: str) -> None:
        layout_publish(root, iteration, attempt)
        next(layout.final_path(root, iteration).glob("*.distcp")).unlink()

    layout_publish = layout.publish
    monkeypatch.setattr(layout, "publish", lose_a_shard)
    save(tmp_path, 20, keep_last=1)
    assert layout.final_iterations(tmp_path) == [10, 20]
    assert "the checkpoint of iteration 20 is no longer valid" in caplog.text
    assert find_checkpoint(tmp_path).iteration == 10


@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_retention_of_zero_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} \(0\) must be at least 1"):
        save(tmp_path, 10, **{name: 0})
    assert layout.final_iterations(tmp_path) == []


def test_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*are untouched"):
            save(tmp_path, 20)
    assert layout.final_iterations(tmp_path) == [10]
    assert not list(tmp_path.glob("*tmp*"))
    assert find_checkpoint(tmp_path).iteration == 10


def test_failed_rename_puts_the_replaced_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match="renaming the finished checkpoint failed on"):
            save_checkpoint(tmp_path, 10, make_state(11))
    assert sorted(os.listdir(tmp_path)) == ["iter_0000010", TRACKER]
    assert load_checkpoint(find_checkpoint(tmp_path).path, make_state(0))["iteration"] == 10


@pytest.mark.parametrize("name", ["../out", "a/b", "common.pt", "manifest.json", "x.distcp", ""])
def test_file_names_that_leave_the_directory_or_collide_are_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"cannot hold a file named {name!r}")):
        save(tmp_path / "run", 10, files={name: "text"})
    assert os.listdir(tmp_path / "run") == []


class Opaque:
    """A type that no checkpoint reader admits."""


@pytest.mark.parametrize("place", ["unsharded", "object"])
def test_state_that_could_not_be_loaded_back_is_refused_when_saving(
    tmp_path: Path, place: str
) -> None:
    state: dict[str, Any] = {"w": ShardedTensor.from_rank_offsets("w", torch.ones(2))}
    state["x"] = Opaque() if place == "unsharded" else ShardedObject("o", Opaque(), (1,), (0,))
    with pytest.raises(
        CheckpointError, match=r"could not be loaded back: it asks for `\S+\.Opaque`; save tensors"
    ):
        save_checkpoint(tmp_path / "run", 10, state)


def test_other_keys_and_shapes_are_listed(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    state = make_state(0, width=6, names=("a", *(f"n{i:02}" for i in range(12))))
    message = (
        f"{path} does not fit this run: "
        "12 wanted by this run but not in the checkpoint: "
        + ", ".join(f"model.n{i:02}" for i in range(10))
        + " and 2 more; "
        "1 in the checkpoint but not wanted by this run: model.b; "
        "1 of another shape: model.a: checkpoint (3, 4), this run (3, 6); "
        "use the model configuration of the run that saved it"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path, state)


def test_unread_prefixes_excuse_what_is_in_the_checkpoint_only(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    weights = {"model": make_state(0)["model"]}
    with pytest.raises(CheckpointError, match="not wanted by this run: rng_state/shard_0_1;"):
        load_checkpoint(path, weights)
    loaded = load_checkpoint(path, weights, unread_prefixes=("rng_state",))
    assert torch.equal(loaded["model"]["a"], torch.full((3, 4), 10.0))


def test_read_text_errors_name_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, 10, files={"bad.yaml": "x"})
    (path / "bad.yaml").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=re.escape(f"{path} holds no config.yaml; it")):
        read_text(path, "config.yaml")
    with pytest.raises(CheckpointError, match=r"'\.\./x' is not the plain name of a file"):
        read_text(path, "../x")
    with pytest.raises(CheckpointError, match=r"cannot read .*bad\.yaml"):
        read_text(path, "bad.yaml")


def test_config_differences_name_field_and_both_values(tmp_path: Path) -> None:
    saved = {"num_layers": 4, "betas": [1, 2], "model": {"norm": "rms", "eps": 1}, "old": None}
    wanted = {"num_layers": 6, "betas": (1, 2), "model": {"norm": "rms", "eps": 2}, "new": 3}
    lines = compare_configs(saved, wanted)
    assert lines == [
        "model.eps: checkpoint 1, this run 2",
        "new: checkpoint not set, this run 3",
        "num_layers: checkpoint 4, this run 6",
        "old: checkpoint None, this run not set",
    ]
    assert compare_configs(saved, saved) == []
    text = str(config_mismatch(tmp_path, lines))
    assert all(f"\n  {line}" in text for line in lines)
    assert str(tmp_path / "config.yaml") in text
