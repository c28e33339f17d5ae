"""Writes a checkpoint of weights block by block, in one process that never holds them all.

The result is the same directory that `save` writes from one rank: a shard file of serialized
blocks, torch's `.metadata` that says where each lies, megatron-core's `common.pt` and
`metadata.json`, our manifest. Each block becomes a chunk of its own, so that any rank of any layout
reads only what it needs.
"""

import contextlib
import math
import os
import pickle
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.trainer.checkpoint import layout
from megatron.trainer.checkpoint.manifest import (
    FileRecord,
    hash_files,
    list_files,
    write_manifest,
)
from megatron.trainer.checkpoint.stages import write_errors_kept
from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.atomic_write import sync_directory, write_durably
from megatron.trainer.io.hashing import Digest, DigestThread

_SHARD_NAME = "__0_0.distcp"
_METADATA_NAME = ".metadata"
_STEP_BYTES = 32 << 20


class CheckpointStream:
    """Receives the blocks of a checkpoint; `streamed_checkpoint` creates and completes it.

    Args:
        directory: exists, and is empty of these files.
        shapes: of every tensor to come, by global name.
        dtype: of every tensor.
        digests: hashes the shard file while it is written.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        digests: DigestThread,
    ) -> None:
        self._directory, self._shapes, self._dtype = directory, shapes, dtype
        self._digests, self._digest = digests, Digest(_SHARD_NAME)
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in shapes}
        self._missing = {key: math.prod(shape) for key, shape in shapes.items()}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: BinaryIO = (directory / _SHARD_NAME).open("xb", buffering=1 << 16)
        self._reader = os.open(directory / _SHARD_NAME, os.O_RDONLY)
        self._hashed = 0

    def close(self) -> None:
        """Close the files; complete or not."""
        self._file.close()
        os.close(self._reader)

    def write(self, key: str, offset: tuple[int, ...], block: torch.Tensor) -> None:
        """Write one block.

        Args:
            key: global name of the tensor.
            offset: where the block begins in it.
            block: as many axes as the tensor, of the checkpoint's type. Blocks of a tensor must
                not overlap; together they must fill it.
        """
        shape = self._shapes[key]
        ends = [start + size for start, size in zip(offset, block.shape, strict=True)]
        if len(shape) != len(ends) or any(e > s for e, s in zip(ends, shape, strict=True)):
            raise ValueError(
                f"a block {tuple(block.shape)} at {offset} does not fit {key} of shape {shape}; it"
                " must lie within the tensor"
            )
        if block.dtype is not self._dtype:
            raise ValueError(f"{key} is {block.dtype}; the checkpoint holds {self._dtype}")
        begin = self._file.tell()
        # A view is serialized with all of the memory it is a view of.
        is_view = block.untyped_storage().nbytes() != block.nbytes or not block.is_contiguous()
        whole = block.clone(memory_format=torch.contiguous_format) if is_view else block
        crc32 = torch.serialization.get_crc32_options()
        # The manifest has a SHA-256; torch's own sum, which it never compares, costs as much again
        # as all the rest of its work.
        torch.serialization.set_crc32_options(False)
        try:
            with write_errors_kept():
                torch.save(whole, self._file)
        finally:
            torch.serialization.set_crc32_options(crc32)
        length = self._file.tell() - begin
        at = torch.Size(offset)
        index = MetadataIndex(key, at, index=len(self._chunks[key]))
        self._places[index] = _StorageInfo(_SHARD_NAME, begin, length)
        self._chunks[key].append(ChunkStorageMetadata(offsets=at, sizes=block.shape))
        self._missing[key] -= block.numel()
        self._hash(begin + length)

    def finish(self, iteration: int) -> None:
        """Describe what was written, force all to disk and write the manifest.

        Raises:
            ValueError: the blocks of some tensor do not fill it.
        """
        wrong = [key for key, missing in self._missing.items() if missing]
        if wrong or len(set(self._places)) != sum(map(len, self._chunks.values())):
            raise ValueError(
                f"{len(wrong)} tensors were not filled, {wrong[:1]} for example; blocks must fill"
                " every tensor, each place once"
            )
        self._file.flush()
        self._hash(self._file.tell(), is_last=True)
        self._write_metadata()
        torch.save({}, self._directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist"), str(self._directory))
        os.fsync(self._reader)
        self._digests.finish()
        others = [name for name in list_files(self._directory) if name != _SHARD_NAME]
        shard = FileRecord(size_bytes=self._file.tell(), sha256=self._digest.hexdigest())
        records = {**hash_files(self._directory, others), _SHARD_NAME: shard}
        write_manifest(self._directory, iteration, records)

    def _hash(self, end: int, *, is_last: bool = False) -> None:
        """Queue for the hashing thread what is in the file by now."""
        if not is_last:
            end -= end % _STEP_BYTES
            if end <= self._hashed:
                return
            self._file.flush()
        self._digests.add(self._digest, self._reader, self._hashed, end - self._hashed)
        self._hashed = end

    def _write_metadata(self) -> None:
        """Write torch's description of the shard file, every field as its own writer sets it."""
        tensors = {
            key: TensorStorageMetadata(
                properties=TensorProperties(dtype=self._dtype),
                size=torch.Size(shape),
                chunks=self._chunks[key],
            )
            for key, shape in self._shapes.items()
        }
        metadata = Metadata(
            state_dict_metadata=dict(tensors),
            storage_data=self._places,
            storage_meta=StorageMeta(
                checkpoint_id=self._directory, save_id=str(uuid.uuid4()), load_id=str(uuid.uuid4())
            ),
            version=CURRENT_DCP_VERSION,
        )
        with (self._directory / _METADATA_NAME).open("wb") as file:
            pickle.dump(metadata, file)


@contextlib.contextmanager
def streamed_checkpoint(
    root: Path,
    iteration: int,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    files: Mapping[str, str | bytes],
    digests: DigestThread,
) -> Iterator[CheckpointStream]:
    """Yield a stream to fill; it becomes `root/iter_NNNNNNN` if the block ends without an error.

    When it ends badly, or is interrupted, nothing of it is left. A killed process leaves a
    directory that no reader takes for a checkpoint and the next save removes.

    Args:
        root: the run directory; holds no checkpoint, and is made if need be.
        iteration: that the checkpoint is of.
        shapes: of every tensor, by global name.
        dtype: of every tensor.
        files: small files to keep beside the weights, by name.
        digests: a running thread.

    Raises:
        CheckpointError: there are checkpoints already.
    """
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    attempt = secrets.token_hex(4)
    partial = layout.partial_path(root, iteration, attempt)
    try:
        layout.clear_leftovers(root)
        if layout.final_iterations(root):
            raise CheckpointError(f"{root} holds checkpoints already; give another directory")
        partial.mkdir()
        for name, content in files.items():
            write_durably(partial / name, content)
        stream = CheckpointStream(partial, shapes, dtype, digests)
        try:
            yield stream
            stream.finish(iteration)
        finally:
            stream.close()
        layout.publish(root, iteration, attempt)
        layout.write_tracker(root, iteration)
        sync_directory(root.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # not ours to remove when something else is there
                root.rmdir()
        raise
