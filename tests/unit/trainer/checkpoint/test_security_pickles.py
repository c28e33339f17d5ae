"""Checkpoint directories with something hostile in each place where a pickle could lie.

`test_safe_load.py` has the payloads that call a function; here are those that need none:
addresses, sizes and contradictions.
"""

import dataclasses
import io
import json
import os
import pickle
import re
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.trainer.checkpoint import (
    CheckpointReader,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.trainer.checkpoint.manifest import write_manifest
from megatron.trainer.checkpoint.safe_load import load_metadata, load_trusted_types
from megatron.trainer.errors import CheckpointError

MIB = 1 << 20
NO_TYPE: Any = "f4"


def state(weight: float = 0.0, extra: Any = 1) -> dict[str, Any]:
    return {
        "w": ShardedTensor.from_rank_offsets("w", torch.full((2, 3), weight)),
        "object": ShardedObject("object", extra, (1,), (0,)),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run", 1, state(3.0))


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def edit_metadata(path: Path, edit: Callable[[Any], None]) -> None:
    """Change what the metadata says, and the manifest: who writes one can write the other."""
    with (path / ".metadata").open("rb") as file:
        metadata = load_metadata(file)
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(path, 1)


def replace_chunk(path: Path, content: bytes, key: str = "w") -> None:
    """Put bytes where the metadata looks for a chunk or an object."""
    shard = next(path.glob("*.distcp"))
    begin = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + content)

    def edit(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn.startswith(key):
                info.offset, info.length = begin, len(content)

    edit_metadata(path, edit)


class Address:
    """An array of one object that lies at an address which stands in the file."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return np.ndarray, ((1,), "O", struct.pack("<Q", self.address))


def follow(file: io.BytesIO) -> Any:
    """What torch alone makes of a file, once megatron-core has declared its types safe."""
    register_safe_globals()
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("place", ["common.pt", "tensor", "object"])
def test_an_array_is_not_made_to_follow_an_address(
    place: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = ["an object of this process"]
    content = torch_bytes({"x": Address(id(secret))})
    assert follow(io.BytesIO(content))["x"][0] is secret  # it is that easy

    register_safe_globals()
    if place == "common.pt":
        (path / place).write_bytes(content)
        write_manifest(path, 1)
    else:
        replace_chunk(path, content, "w" if place == "tensor" else "object")
    with pytest.raises(CheckpointError, match=r"asks for `numpy\.ndarray`; a checkpoint needs no"):
        load_checkpoint(path, state())


def test_what_is_not_loaded_back_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"asks for `numpy\S+`; save tensors, numbers"):
        save_checkpoint(tmp_path, 1, state(extra=np.ones(2)))
    assert list(tmp_path.iterdir()) == []


def deflated(content: bytes) -> bytes:
    """The same archive, squeezed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["common.pt", "tensor", "object"])
@pytest.mark.parametrize("kind", ["deflated", "older format"])
def test_only_the_archives_that_torch_writes_are_opened(place: str, kind: str, path: Path) -> None:
    large = torch.zeros(1 << 20)
    content = torch_bytes(large, _use_new_zipfile_serialization=kind == "deflated")
    if kind == "deflated":
        content = deflated(content)
        assert len(content) < 1 << 15  # would unpack to 4 MiB
    if place == "common.pt":
        (path / place).write_bytes(content)
        write_manifest(path, 1)
    else:
        replace_chunk(path, content, "w" if place == "tensor" else "object")
    told = "in it is compressed" if kind == "deflated" else "File is not a zip file"
    with pytest.raises(CheckpointError, match=rf"cannot read .*{told}"):
        load_checkpoint(path, state())


def test_pickles_beside_the_checkpoint_are_left_alone(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(canary),)

    for name in ("rng_state.pt", "optimizer.pt", "args.pkl", "extra.npy", "0.metadata", "__1.pt"):
        (path / name).write_bytes(pickle.dumps(Payload()))
    write_manifest(path, 1)
    found = find_checkpoint(path.parent)
    loaded = load_checkpoint(found.path, state())
    assert torch.equal(loaded["w"], torch.full((2, 3), 3.0))
    with CheckpointReader(path) as reader:
        assert torch.equal(reader.read("w", (0, 0), (2, 3)), torch.full((2, 3), 3.0))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", r"says that the format is \[\]"),
        (b'{"sharded_backend": "zarr"}', "only torch_dist checkpoints can be loaded"),
        (b'{"sharded_backend": "torch_dist", "common_backend": "os:system"}', "os:system"),
        (b'{"sharded_backend": {"x": [1]}}', "only torch_dist checkpoints can be loaded"),
        (b"[" * 100_000, "is not JSON"),
        (b"{", "is not JSON"),
    ],
)
def test_backends_that_a_file_names_are_not_looked_up(
    content: bytes, told: str, path: Path
) -> None:
    (path / "metadata.json").write_bytes(content)
    write_manifest(path, 1)
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(path, state())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


NESTED = b"".join(b"\x94h" + bytes([depth]) + b"\x86" for depth in range(60))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x04Nr" + struct.pack("<I", 1 << 31) + b".", id="memo of 32 GiB"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", id="bytes of 1 TiB"),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.", id="frame of 1 PiB"),
        pytest.param(b"\x80\x04})" + NESTED + b"Ns.", id="a key of 2**60 tuples"),
        pytest.param(b"\x80\x04})" + b"\x85" * 10_000 + b"Ns.", id="a key 10000 deep"),
        pytest.param(b"\x80\x04\x8f.", id="a set"),
    ],
)
def test_metadata_cannot_ask_for_memory_or_time(content: bytes) -> None:
    before = peak_bytes()
    with pytest.raises(CheckpointError, match="damaged"):
        load_metadata(io.BytesIO(content))
    assert peak_bytes() - before < 64 * MIB


def chunk(*sizes: int, at: tuple[int, ...] = (0, 0)) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(at), sizes=torch.Size(sizes))


def describe(**changes: Any) -> Callable[[Any], None]:
    """Change the record of the tensor `w`."""

    def edit(metadata: Metadata) -> None:
        record = metadata.state_dict_metadata["w"]
        metadata.state_dict_metadata["w"] = dataclasses.replace(record, **changes)

    return edit


def place(**changes: Any) -> Callable[[Any], None]:
    """Change where everything lies."""

    def edit(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                setattr(info, name, value)

    return edit


def misplace(metadata: Any) -> None:
    index = MetadataIndex("w", torch.Size((1, 0)), 1)
    metadata.storage_data[index] = next(iter(metadata.storage_data.values()))


def forget(metadata: Any) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == "w"]:
        del metadata.storage_data[index]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (describe(chunks=[]), "its chunks hold 0 of the 6 values of w"),
        (describe(chunks=[chunk(1, 3)]), "its chunks hold 3 of the 6 values of w"),
        (describe(chunks=[chunk(2, 3), chunk(2, 3)]), "its chunks hold 12 of the 6 values"),
        (describe(chunks=[chunk(2, 4)]), r"does not lie within its shape, \(2, 3\)"),
        (describe(chunks=[chunk(2, 3, at=(0, -1))]), "does not lie within its shape"),
        (describe(chunks=[chunk(6, at=(0,))]), "does not lie within its shape"),
        (describe(size=torch.Size((1 << 40, 1 << 40))), "of the shape"),
        (describe(size="2x3"), "of the shape '2x3'"),
        (describe(properties=TensorProperties(dtype=NO_TYPE)), "describes w as 'f4'"),
        (place(offset=-1), r"at the bytes \(-1, \d+\)"),
        (place(length=1 << 60), "at the bytes"),
        (place(length="x"), r"at the bytes \(\d+, 'x'\)"),
        (place(relative_path="../__0_0.distcp"), r"points to the file '\.\./__0_0\.distcp'"),
        (place(relative_path="/etc/passwd"), "points to the file '/etc/passwd'"),
        (place(relative_path=".."), r"points to the file '\.\.'"),
        (place(relative_path=3), "points to the file 3"),
        (place(transform_descriptors=["zstd"]), r"stores \S+ \('zstd'\)-encoded"),
        (misplace, r"places a chunk of w at \(1, 0\) that it does not describe"),
        (forget, r"does not say where the chunk of w at \(0, 0\) lies"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused_by_both_readers(
    edit: Callable[[Any], None], told: str, path: Path
) -> None:
    edit_metadata(path, edit)
    message = rf"^refused to load {re.escape(str(path))}/\.metadata: .*{told}.*take another"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, state())
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path)


def test_a_record_without_its_fields_is_refused(path: Path) -> None:
    def edit(metadata: Any) -> None:
        metadata.state_dict_metadata["w"] = TensorStorageMetadata.__new__(TensorStorageMetadata)

    edit_metadata(path, edit)
    with pytest.raises(CheckpointError, match="holds a record without all of its fields"):
        CheckpointReader(path)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "manifest.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, path: Path) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} (has None|cannot be read: it)"):
        find_checkpoint(path.parent)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} (has None|cannot be read: it)"):
        load_checkpoint(path, state())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"files": {"../x": {"bytes": 1, "sha256": "0"}}}, r"bad entry for '\.\./x'"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "bad entry for '/etc/passwd'"),
        ({"files": {"..": {"bytes": 1, "sha256": "0"}}}, "bad entry for"),
        ({"files": {"a\0b": {"bytes": 1, "sha256": "0"}}}, "bad entry for"),
        ({"files": {"common.pt": {"bytes": True, "sha256": "0"}}}, "bad entry for 'common.pt'"),
        ({"files": {"common.pt": {"bytes": 1, "sha256": 7}}}, "bad entry for 'common.pt'"),
        ({"files": {"common.pt": []}}, "bad entry for 'common.pt'"),
        ({"iteration": True}, "lacks `iteration` or `files`"),
        ({"files": []}, "lacks `iteration` or `files`"),
    ],
)
def test_a_hostile_manifest_is_refused(content: dict[str, Any], told: str, path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **content}))
    with pytest.raises(CheckpointError, match=told):
        find_checkpoint(path.parent)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"nul"])
def test_a_manifest_that_is_no_json_is_refused(content: bytes, path: Path) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json (cannot be read|has format)"):
        find_checkpoint(path.parent)


def test_a_manifest_of_any_size_takes_bounded_memory(path: Path) -> None:
    with (path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole; takes no room on the disk
    before = peak_bytes()
    with pytest.raises(CheckpointError, match=r"more than 67,108,864 bytes, which no such file"):
        find_checkpoint(path.parent)
    assert peak_bytes() - before < 300 * MIB


def test_what_others_declared_safe_is_forgotten() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.serialization.add_safe_globals([np.ndarray])
    assert load_trusted_types(io.BytesIO(torch_bytes({"a": 1})), name="x") == {"a": 1}
    assert torch.serialization.get_safe_globals() == []
