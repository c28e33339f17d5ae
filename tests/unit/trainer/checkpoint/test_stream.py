"""Checkpoints written and read block by block, compared with those of the ordinary writer."""

import hashlib
import io
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron.trainer.checkpoint import (
    CheckpointReader,
    CheckpointStream,
    ManifestCheck,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    streamed_checkpoint,
)
from megatron.trainer.checkpoint.manifest import write_manifest
from megatron.trainer.checkpoint.safe_load import load_metadata
from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.hashing import Digest, DigestThread

SHARD = "__0_0.distcp"
SHAPES = {"layers.w": (3, 4, 5), "norm": (7,)}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in SHAPES.items()}


def blocks(values: dict[str, torch.Tensor]) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
    """A layer of `layers.w` at a time, as views."""
    layers = [("layers.w", (row, 0, 0), values["layers.w"][row : row + 1]) for row in range(3)]
    return [*layers, ("norm", (0,), values["norm"])]


def stream(
    root: Path, parts: list[tuple[str, tuple[int, ...], torch.Tensor]], **files: str | bytes
) -> Path:
    with (
        DigestThread() as thread,
        streamed_checkpoint(
            root, 3, shapes=SHAPES, dtype=parts[0][2].dtype, files=files, digests=thread
        ) as out,
    ):
        for key, offset, block in parts:
            out.write(key, offset, block)
    return root / "iter_0000003"


def request(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As a model asks: a layer is a tensor of its own with an axis put in front."""
    layers = {
        f"{row}": ShardedTensor.from_rank_offsets(
            "layers.w", values["layers.w"][row], (0, row, 3), prepend_axis_num=1
        )
        for row in range(3)
    }
    return {**layers, "norm": ShardedTensor.from_rank_offsets("norm", values["norm"])}


def described(path: Path) -> dict[str, Any]:
    with (path / ".metadata").open("rb") as file:
        metadata = load_metadata(file)
    stored = {
        (index.fqn, index.offset, index.index): info.relative_path
        for index, info in metadata.storage_data.items()
    }
    others = {
        name: value
        for name, value in vars(metadata).items()
        if name not in {"state_dict_metadata", "storage_data", "storage_meta"}
    }
    return {"tensors": metadata.state_dict_metadata, "stored": stored, **others}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streamed_checkpoint_is_the_one_that_save_writes(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    values = tensors(dtype)
    saved = save_checkpoint(tmp_path / "saved", 3, request(values), files={"run.json": "{}"})
    path = stream(tmp_path / "streamed", blocks(values), **{"run.json": "{}"})

    assert sorted(os.listdir(path)) == sorted(os.listdir(saved))
    assert sorted(os.listdir(path.parent)) == sorted(os.listdir(saved.parent))
    assert described(path) == described(saved)
    for name in ("metadata.json", "run.json"):
        assert (path / name).read_text() == (saved / name).read_text()
    empty = {key: torch.zeros_like(value) for key, value in values.items()}
    assert find_checkpoint(path.parent).path == path
    loaded = load_checkpoint(path, request(empty))
    assert torch.equal(torch.stack([loaded[f"{row}"] for row in range(3)]), values["layers.w"])
    assert torch.equal(loaded["norm"], values["norm"])


def test_stored_chunk_holds_no_more_than_the_block(tmp_path: Path) -> None:
    """Serializing a view would store the whole tensor with every block."""
    big = torch.randn(3, 100, 100)
    with (
        DigestThread() as thread,
        streamed_checkpoint(
            tmp_path, 3, shapes={"w": (3, 100, 100)}, dtype=big.dtype, files={}, digests=thread
        ) as out,
    ):
        for row in range(3):
            out.write("w", (row, 0, 0), big[row : row + 1])
    assert (tmp_path / "iter_0000003" / SHARD).stat().st_size < 1.1 * big.nbytes


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("cut", ["layers", "columns", "whole"])
def test_any_block_is_read_from_any_chunks(cut: str, cache_bytes: int, tmp_path: Path) -> None:
    values = tensors()
    whole = values["layers.w"]
    cuts: dict[str, list[tuple[str, tuple[int, ...], torch.Tensor]]] = {
        "layers": blocks(values)[:3],
        "whole": [("layers.w", (0, 0, 0), whole)],
        "columns": [
            ("layers.w", (0, 0, 0), whole[..., :2]),
            ("layers.w", (0, 0, 2), whole[..., 2:]),
        ],
    }
    path = stream(tmp_path, [*cuts[cut], ("norm", (0,), values["norm"])])
    with CheckpointReader(path, cache_bytes=cache_bytes) as reader:
        assert {key: stored.shape for key, stored in reader.tensors.items()} == SHAPES
        assert {stored.dtype for stored in reader.tensors.values()} == {torch.bfloat16}
        for offset, sizes in (
            ((0, 0, 0), (3, 4, 5)),
            ((1, 0, 0), (1, 4, 5)),
            ((1, 2, 1), (2, 2, 3)),
            ((2, 3, 4), (1, 1, 1)),
        ):
            window = tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
            assert torch.equal(reader.read("layers.w", offset, sizes), whole[window])
        assert torch.equal(reader.read("norm", (0,), (7,)), values["norm"])


def test_reader_reads_what_save_wrote(tmp_path: Path) -> None:
    values = tensors()
    path = save_checkpoint(tmp_path, 1, request(values))
    with CheckpointReader(path) as reader:
        assert torch.equal(reader.read("layers.w", (0, 0, 0), (3, 4, 5)), values["layers.w"])


@pytest.mark.parametrize(
    "parts",
    [
        blocks(tensors())[:3],
        blocks(tensors())[1:],
        [*blocks(tensors()), blocks(tensors())[0]],
        [blocks(tensors())[0], *blocks(tensors())[:2], blocks(tensors())[3]],
    ],
    ids=["no norm", "no first layer", "one twice", "one twice for another"],
)
def test_tensor_that_is_not_filled_once_is_an_error_and_leaves_nothing(
    parts: list[tuple[str, tuple[int, ...], torch.Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="blocks must fill every tensor, each place once"):
        stream(tmp_path / "run", parts)
    assert os.listdir(tmp_path) == []


def test_block_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it must lie within the tensor"):
        stream(tmp_path, [("norm", (3,), torch.zeros(7))])
    with pytest.raises(ValueError, match=re.escape("norm is torch.float32; the checkpoint holds")):
        stream(tmp_path, [blocks(tensors())[0], ("norm", (0,), torch.zeros(7))])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing_and_spares_what_was_there(
    error: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    for name in ("new", "there"):
        with (
            pytest.raises(error),
            DigestThread() as thread,
            streamed_checkpoint(
                tmp_path / name,
                3,
                shapes=SHAPES,
                dtype=torch.bfloat16,
                files={"a": b"1"},
                digests=thread,
            ) as out,
        ):
            out.write(*blocks(tensors())[0])
            raise error
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == ["notes.txt"]


def test_full_disk_is_told_as_such_by_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps the failure of a file that it writes to; the caller must see the disk's."""
    monkeypatch.setattr(CheckpointStream, "_hash", lambda *_, **__: None)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with DigestThread() as thread:
        out = CheckpointStream(tmp_path, {"w": (1 << 20,)}, torch.float32, thread)
        with full.open("wb") as file:
            monkeypatch.setattr(out, "_file", file)
            with pytest.raises(OSError, match="No space left on device"):
                out.write("w", (0,), torch.zeros(1 << 20))
            monkeypatch.undo()
            with pytest.raises(OSError, match="No space left on device"):
                file.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        out.close()


def test_run_with_checkpoints_is_not_written_into(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, request(tensors()))
    message = f"{tmp_path} holds checkpoints already; give another directory"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        stream(tmp_path, blocks(tensors()))
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def check(path: Path) -> None:
    with CheckpointReader(path) as reader, DigestThread() as thread:
        manifest = ManifestCheck(reader, thread)
        for place in reader.places("layers.w", (0, 0, 0), (3, 4, 5)):
            manifest.reach(place)
        manifest.finish()


def test_changed_byte_is_found_before_anything_is_published(tmp_path: Path) -> None:
    path = stream(tmp_path, blocks(tensors()))
    check(path)
    content = bytearray((path / SHARD).read_bytes())
    for position in (100, len(content) - 1):
        content[position] ^= 1
        (path / SHARD).write_bytes(content)
        message = f"{path} is damaged: {SHARD} has changed: its SHA-256 is not the manifest's"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            check(path)
        content[position] ^= 1


def test_lost_file_is_found_at_once(tmp_path: Path) -> None:
    path = stream(tmp_path, blocks(tensors()))
    (path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=re.escape("common.pt is missing")):
        check(path)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def replace_chunk(path: Path, value: Any) -> None:
    """Let the metadata find another object where `norm` was; the manifest agrees."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with (path / ".metadata").open("rb") as file:
        metadata = load_metadata(file)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "norm")
    info.offset, info.length = (path / SHARD).stat().st_size, len(buffer.getvalue())
    with (path / SHARD).open("ab") as file:
        file.write(buffer.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / "manifest.json").unlink()
    write_manifest(path, 3)


def test_hostile_chunk_is_refused_and_not_run(tmp_path: Path) -> None:
    path = stream(tmp_path / "run", blocks(tensors()))
    replace_chunk(path, Payload(tmp_path / "canary"))
    with (
        CheckpointReader(path) as reader,
        pytest.raises(CheckpointError, match=re.escape("it asks for `posix.system`")),
    ):
        reader.read("norm", (0,), (7,))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("value", [torch.zeros(8), torch.zeros(7), [1]], ids=str)
def test_chunk_that_is_not_what_the_metadata_says_is_refused(value: Any, tmp_path: Path) -> None:
    path = stream(tmp_path, blocks(tensors()))
    replace_chunk(path, value)
    message = "the metadata says (7,) of torch.bfloat16; the checkpoint is damaged"
    with (
        CheckpointReader(path) as reader,
        pytest.raises(CheckpointError, match=re.escape(message)),
    ):
        reader.read("norm", (0,), (7,))


def test_block_that_is_there_in_part_is_refused(tmp_path: Path) -> None:
    path = stream(tmp_path, blocks(tensors()))
    with (path / ".metadata").open("rb") as file:
        metadata = load_metadata(file)
    first, second, _third = metadata.state_dict_metadata["layers.w"].chunks  # type: ignore[union-attr]
    del metadata.storage_data[MetadataIndex("layers.w", second.offsets)]
    second.offsets = first.offsets  # the same place twice, and another not at all
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with (
        CheckpointReader(path) as reader,
        pytest.raises(CheckpointError, match=re.escape("stores 40 of the 60 values of layers.w")),
    ):
        reader.read("layers.w", (0, 0, 0), (3, 4, 5))


def test_manifest_of_a_streamed_checkpoint_names_every_file(tmp_path: Path) -> None:
    path = stream(tmp_path, blocks(tensors()), **{"config.yaml": "a: 1\n"})
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() == {".metadata", SHARD, "common.pt", "config.yaml", "metadata.json"}


def test_digests_of_regions_in_any_number_of_parts(tmp_path: Path) -> None:
    content = os.urandom(5_000_000)
    (tmp_path / "x").write_bytes(content)

    with (tmp_path / "x").open("rb") as file, DigestThread() as thread:
        whole, middle = Digest("whole"), Digest("middle")
        for begin in range(0, len(content), 1_234_567):
            part = min(1_234_567, len(content) - begin)
            thread.add(whole, file.fileno(), begin, part)
            if begin == 0:
                thread.add(middle, file.fileno(), 17, 1000)
        thread.finish()
        assert whole.hexdigest() == hashlib.sha256(content).hexdigest()
        assert middle.hexdigest() == hashlib.sha256(content[17:1017]).hexdigest()
        thread.add(Digest("beyond"), file.fileno(), len(content) - 1, 5)
        with pytest.raises(CheckpointError, match="beyond ends 4 bytes too early"):
            thread.finish()
