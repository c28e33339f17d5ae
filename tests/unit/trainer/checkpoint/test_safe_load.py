"""Hostile files are refused and nothing in them runs: each holds a payload that leaves a canary."""

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from packaging.version import Version
from torch.distributed.checkpoint import CheckpointException, filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron.trainer.checkpoint import load_checkpoint, save, save_checkpoint
from megatron.trainer.checkpoint.manifest import write_manifest
from megatron.trainer.checkpoint.safe_load import install_guards, load_metadata, load_trusted_types
from megatron.trainer.errors import CheckpointError

REMEDY = (
    "; a checkpoint needs no such thing, so this one was made to run code on the machine that "
    "loads it, or is damaged; do not load checkpoints from people you do not trust"
)


class Payload:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def payload_state(weight: float, extra: Any) -> dict[str, Any]:
    return {
        "w": ShardedTensor.from_rank_offsets("w", torch.full((2,), weight)),
        "object": ShardedObject("object", extra, (1,), (0,)),
    }


def checkpoint(root: Path, extra: Any = 1) -> Path:
    return save_checkpoint(root, 1, payload_state(3.0, extra))


def plant(path: Path, content: bytes) -> None:
    """Replace one file, and the manifest: who writes the one can write the other."""
    path.write_bytes(content)
    write_manifest(path.parent, 1)


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Ways to write the same command down, with the global that each one names."""
    command = f"touch {canary}"
    length = len(command).to_bytes(1, "little")
    module = b"\x8c\x13torch.serialization"
    dotted = b"\x80\x04" + module + b"\x8c\x09os.system\x93\x8c" + length + command.encode()
    return {
        "posix.system": pickle.dumps(Payload(command), protocol=4),
        # protocol 0 spells the global out (GLOBAL), 4 takes it from the stack (STACK_GLOBAL)
        "posix.system ": pickle.dumps(Payload(command), protocol=0),
        "builtins.eval": f"cbuiltins\neval\n(S\"__import__('os').mknod('{canary}')\"\ntR.".encode(),
        # an allowed module, a path through its attributes
        "torch.serialization.os.system": dotted + b"\x85R.",
        # behind a genuine record, so that its type does not give it away
        "posix.system  ": pickle.dumps(Metadata({}, planner_data=Payload(command))),
    }


@pytest.mark.parametrize("kind", sorted(payloads(Path("x"))))
def test_hostile_metadata_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    evil = payloads(canary)[kind]
    path = checkpoint(tmp_path / "run")
    plant(path / ".metadata", evil)

    message = f"refused to load {path / '.metadata'}: it asks for `{kind.strip()}`{REMEDY}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path, payload_state(0.0, None))
    assert not canary.exists()

    with (path / ".metadata").open("rb") as file:  # the payload is live: pickle runs it
        pickle.load(file)
    assert canary.exists()


@pytest.mark.parametrize("override", [False, True])
def test_hostile_object_in_a_shard_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: bool
) -> None:
    canary = tmp_path / "canary"
    with monkeypatch.context() as patch:
        patch.setattr(save, "_check_loadable", lambda _source, _name: None)
        path = checkpoint(tmp_path / "run", [Payload(f"touch {canary}")])
    if override:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    message = f"refused to load object object/shard_0_1: it asks for `posix.system`{REMEDY}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path, payload_state(0.0, None))
    assert not canary.exists()

    shard = next(path.glob("*.distcp")).read_bytes()
    live = shard[shard.index(b"PK\x03\x04") :]  # the object comes first, then the tensors
    torch.load(io.BytesIO(live[: live.index(b"PK\x05\x06") + 22]), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("override", [False, True])
def test_hostile_common_pt_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: bool
) -> None:
    canary = tmp_path / "canary"
    path = checkpoint(tmp_path / "run")
    plant(path / "common.pt", torch_bytes({"iteration": Payload(f"touch {canary}")}))
    if override:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    message = f"refused to load {path / 'common.pt'}: it asks for `posix.system`{REMEDY}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path, payload_state(0.0, None))
    assert not canary.exists()

    torch.load(path / "common.pt", weights_only=False)
    assert canary.exists()


@pytest.fixture
def own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose unsharded state is an object of the shards, as megatron-core 0.19 writes.

    The object touches `canary`; there is no `common.pt`.
    """
    state = payload_state(3.0, 1)
    payload = [{"iteration": Payload(f"touch {tmp_path / 'canary'}")}]
    state["common"] = ShardedObject("common_state", payload, (1,), (0,))
    with monkeypatch.context() as patch:
        patch.setattr(save, "_check_loadable", lambda _source, _name: None)
        path = save_checkpoint(tmp_path / "run", 1, state)
    (path / "common.pt").unlink()
    write_manifest(path, 1)
    return path


@pytest.mark.parametrize("override", [False, True])
def test_hostile_common_state_is_refused_and_not_run(
    own_format: Path, monkeypatch: pytest.MonkeyPatch, override: bool
) -> None:
    canary = own_format.parents[1] / "canary"
    if override:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    message = f"{own_format} holds no common.pt; it is incomplete, or in a form of megatron-core's"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_checkpoint(own_format, payload_state(0.0, None))

    # megatron-core's own reader: 0.16 wants the file, 0.19 reads the object.
    refused = f"refused to load object common_state/shard_0_1: it asks for `posix.system`{REMEDY}"
    absent = f"{own_format / 'common.pt'} does not exist"
    message = refused if Version(version("megatron-core")) >= Version("0.19") else absent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        with pytest.raises((CheckpointError, CheckpointException), match=re.escape(message)):
            dist_checkpointing.load_common_state_dict(str(own_format))

    torch.save({}, own_format / "common.pt")
    write_manifest(own_format, 1)
    with pytest.raises(CheckpointError, match="not wanted by this run: common_state/shard_0_1"):
        load_checkpoint(own_format, payload_state(0.0, None))
    assert not canary.exists()

    shard = next(own_format.glob("*.distcp")).read_bytes()
    at = shard.rindex(b"PK\x03\x04", 0, shard.index(str(canary).encode()))
    torch.load(io.BytesIO(shard[at : shard.index(b"PK\x05\x06", at) + 22]), weights_only=False)
    assert canary.exists()


def test_megatron_cores_own_entry_points_are_guarded_too(tmp_path: Path) -> None:
    install_guards()
    canary = tmp_path / "canary"
    path = checkpoint(tmp_path / "run")
    plant(path / "common.pt", torch_bytes(Payload(f"touch {canary}")))
    with pytest.raises(CheckpointError, match=re.escape("asks for `posix.system`")):
        dist_checkpointing.load_common_state_dict(str(path))
    plant(path / ".metadata", pickle.dumps(Payload(f"touch {canary}")))
    with pytest.raises(CheckpointError, match=re.escape("asks for `posix.system`")):
        dist_checkpointing.load_tensors_metadata(str(path))
    with pytest.raises(CheckpointError, match=re.escape("asks for `posix.system`")):
        dist_checkpointing.load_plain_tensors(str(path))
    assert not canary.exists()


def test_metadata_pointing_outside_its_directory_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run")
    content = (path / ".metadata").read_bytes()
    for target in (b"../../etc.pt", b"/etc/secrets"):
        assert len(target) == len(b"__0_0.distcp")  # same length, so the pickle stays one
        plant(path / ".metadata", content.replace(b"__0_0.distcp", target))
        message = f"it points to the file {target.decode()!r}; a checkpoint's files lie in its own"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_checkpoint(path, payload_state(0.0, None))


@pytest.mark.parametrize("content", [b"", b"\x80", b"nonsense", b"\x80\x04N."])
def test_bytes_that_are_no_metadata_end_in_one_message(tmp_path: Path, content: bytes) -> None:
    path = checkpoint(tmp_path / "run")
    plant(path / ".metadata", content)
    with pytest.raises(CheckpointError, match=re.escape(str(path / ".metadata"))):
        load_checkpoint(path, payload_state(0.0, None))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense"])
def test_bytes_that_are_no_torch_file_end_in_one_message(tmp_path: Path, content: bytes) -> None:
    path = checkpoint(tmp_path / "run")
    plant(path / "common.pt", content)
    with pytest.raises(CheckpointError, match=re.escape(str(path / "common.pt"))):
        load_checkpoint(path, payload_state(0.0, None))


def test_what_a_run_keeps_is_loaded_unchanged(tmp_path: Path) -> None:
    kept: dict[str, Any] = {
        "rng": torch.get_rng_state(),
        "numbers": [1, 2.5, True, None, "text", (1, 2)],
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }
    path = checkpoint(tmp_path / "run", kept)
    loaded = load_checkpoint(path, payload_state(0.0, None))
    assert torch.equal(loaded["w"], torch.full((2,), 3.0))
    assert torch.equal(loaded["object"]["rng"], kept["rng"])
    assert loaded["object"]["numbers"] == kept["numbers"]
    assert loaded["object"]["bf16"].dtype == torch.bfloat16


def test_metadata_with_megatron_cores_cached_plans_is_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run")
    with (path / ".metadata").open("rb") as file:
        metadata: Any = load_metadata(file)
    index = next(iter(metadata.storage_data))
    plan = SavePlan([WriteItem(index, WriteItemType.SHARD)])
    metadata.all_local_plans = [plan]
    again: Any = load_metadata(io.BytesIO(pickle.dumps(metadata)))
    assert again.all_local_plans == [plan]
    assert again.state_dict_metadata == metadata.state_dict_metadata


def test_guards_are_installed_by_the_call_and_once() -> None:
    install_guards()
    first = (filesystem.pickle, filesystem.torch, DefaultLoadPlanner.load_bytes)
    install_guards()
    assert (filesystem.pickle, filesystem.torch, DefaultLoadPlanner.load_bytes) == first
    assert filesystem.pickle is not pickle
    assert filesystem.torch is not torch
    assert filesystem.torch.save is torch.save
    with pytest.raises(AttributeError, match="not Unpickler"):
        filesystem.pickle.Unpickler  # noqa: B018


def test_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_trusted_types(tmp_path / "absent.pt", name="absent.pt")


# Where the installed releases unpickle files, and why each place is covered. A new name here means
# that a release reads something in a place that `install_guards` does not know.
KNOWN_TORCH = {
    "filesystem.py",  # guarded: .metadata, tensors
    "default_planner.py",  # guarded: objects in .distcp
    "planner.py",  # an example in a docstring
    "state_dict_loader.py",  # a sentence in a docstring
    "format_utils.py",  # converts plain torch files; nothing here calls it
    "_pg_transport.py",  # messages between ranks, no file
    "_experimental/checkpoint_reader.py",  # not reached from torch_dist
}
KNOWN_MEGATRON = {
    "strategies/common.py",  # guarded: common.pt
    "serialization.py",  # 0.19: common_state, which the guarded planner has read before
}


def unpickling_files(package: Path) -> set[str]:
    calls = re.compile(r"\b(pickle\.loads?|[Uu]npickler|torch\.load)\(|weights_only=False")
    return {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if calls.search(path.read_text(encoding="utf-8"))
    }


def test_installed_releases_unpickle_nowhere_else() -> None:
    assert unpickling_files(Path(filesystem.__file__).parent) <= KNOWN_TORCH
    core = Path(megatron.core.__file__).parent / "dist_checkpointing"
    assert unpickling_files(core) <= KNOWN_MEGATRON
