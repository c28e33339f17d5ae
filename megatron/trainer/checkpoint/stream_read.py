"""Reads blocks of a checkpoint's tensors, in one process that never holds them all.

Any layout may have written it: `.metadata` says which chunks of a tensor lie where, and only the
chunks that a block needs are read. Nothing is executed: every chunk goes through `safe_load`.
"""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron.trainer.checkpoint.manifest import read_manifest, verify_manifest
from megatron.trainer.checkpoint.safe_load import load_metadata, load_trusted_types
from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.hashing import Digest, DigestThread

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes of a block within its tensor."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Holds shape, type and chunks of one tensor, from the metadata."""

    shape: tuple[int, ...]
    """Global."""
    dtype: torch.dtype
    """On disk."""


@dataclass(frozen=True, order=True)
class Place:
    """Locates a serialized chunk; places in one file sort by position."""

    file: str
    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Return the offset behind its last byte."""
        return self.begin + self.num_bytes


class CheckpointReader:
    """Reads blocks of a native checkpoint. Use it in a `with` statement.

    The chunks used last are kept, at least one and up to `cache_bytes`, because one that a single
    rank wrote may hold a layer's experts, which are asked for one after another.

    Args:
        path: a checkpoint directory.
        cache_bytes: of chunks kept.

    Raises:
        CheckpointError: its metadata is damaged or unsafe.
    """

    def __init__(self, path: Path, *, cache_bytes: int = 256 << 20) -> None:
        self.path = path
        self._cache_bytes = cache_bytes
        self._cache: dict[Place, torch.Tensor] = {}
        self._stack = contextlib.ExitStack()
        self._files: dict[str, int] = {}
        try:
            with (path / ".metadata").open("rb") as file:
                metadata = load_metadata(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / '.metadata'}: {error.strerror}") from error
        self.tensors: dict[str, StoredTensor] = {}
        self._chunks: dict[str, dict[Box, Place]] = {}
        for key, described in metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata):
                self.tensors[key] = StoredTensor(
                    shape=tuple(described.size), dtype=described.properties.dtype
                )
                self._chunks[key] = {}
        sizes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, described in metadata.state_dict_metadata.items()
            if isinstance(described, TensorStorageMetadata)
            for chunk in described.chunks
        }
        for index, info in (metadata.storage_data or {}).items():
            if index.fqn in self._chunks and index.offset is not None:
                box = (tuple(index.offset), sizes[index.fqn, tuple(index.offset)])
                self._chunks[index.fqn][box] = Place(info.relative_path, info.offset, info.length)

    @property
    def num_bytes(self) -> int:
        """Return the size of all shard files together."""
        names = {place.file for chunks in self._chunks.values() for place in chunks.values()}
        return sum(os.fstat(self.open(name)).st_size for name in names)

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def places(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> dict[Place, Box]:
        """Return the chunks that a block overlaps, in the order of the file, each with its box.

        Raises:
            CheckpointError: the checkpoint holds the block in part only, or twice.
        """
        chunks = self._chunks[key]
        whole = chunks.get((offset, sizes))
        if whole is not None:
            return {whole: (offset, sizes)}
        found = {
            place: box
            for box, place in chunks.items()
            if _volume(_common((offset, sizes), box)) > 0
        }
        stored = sum(_volume(_common((offset, sizes), box)) for box in found.values())
        if stored != math.prod(sizes):
            raise CheckpointError(
                f"{self.path} stores {stored} of the {math.prod(sizes)} values of {key} at"
                f" {offset}; every value must be there once; the checkpoint is damaged, take"
                " another"
            )
        return dict(sorted(found.items()))

    def read(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """Read one block; it may share memory with other blocks and must not be changed.

        Args:
            key: global name of the tensor.
            offset: where the block begins.
            sizes: its shape, as many axes as the tensor.

        Raises:
            CheckpointError: it is not there in full, or its bytes are damaged or unsafe.
        """
        places = self.places(key, offset, sizes)
        if len(places) == 1:
            ((place, box),) = places.items()
            return self._load(key, place, box)[_window((offset, sizes), within=box)]
        block = torch.empty(sizes, dtype=self.tensors[key].dtype)
        for place, box in places.items():
            common = _common((offset, sizes), box)
            block[_window(common, within=(offset, sizes))] = self._load(key, place, box)[
                _window(common, within=box)
            ]
        return block

    def open(self, name: str) -> int:
        """Return the descriptor of a file of the checkpoint; it stays open with the reader."""
        if name not in self._files:
            try:
                file = self._stack.enter_context((self.path / name).open("rb", buffering=0))
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {self.path / name}: {error.strerror}; the checkpoint is"
                    " incomplete, take another"
                ) from error
            self._files[name] = file.fileno()
        return self._files[name]

    def _load(self, key: str, place: Place, box: Box) -> torch.Tensor:
        """Load a complete chunk, from the cache or the file."""
        if place in self._cache:
            return self._cache[place]
        stored = self.tensors[key]
        size = math.prod(box[1]) * stored.dtype.itemsize
        while self._cache and sum(map(_nbytes, self._cache.values())) + size > self._cache_bytes:
            del self._cache[next(iter(self._cache))]
        chunk = load_trusted_types(
            _Window(self.open(place.file), place),  # type: ignore[arg-type]
            name=f"{key} in {self.path / place.file}",
        )
        _check_chunk(chunk, key, stored, box)
        self._cache[place] = chunk
        return chunk


class ManifestCheck:
    """Compares a checkpoint's files with its manifest while they are being read.

    `find_checkpoint` reads every byte before the first is used; here a second thread hashes what
    the first is about to read, so that the disk is read once. Nothing that was made of the
    checkpoint may be published before `finish`.

    Args:
        reader: of the checkpoint.
        digests: a running thread.

    Raises:
        CheckpointError: names or sizes of files differ.
    """

    def __init__(self, reader: CheckpointReader, digests: DigestThread) -> None:
        self._reader, self._thread = reader, digests
        problems = verify_manifest(reader.path, checksums=False)
        if problems:
            raise _damaged(reader.path, problems)
        self._records = read_manifest(reader.path).files
        self._done = dict.fromkeys(self._records, 0)
        self._digests = {name: Digest(str(reader.path / name)) for name in self._records}

    def reach(self, place: Place) -> None:
        """Hash a file up to the end of a chunk that is about to be read."""
        self._hash(place.file, place.end)

    def finish(self) -> None:
        """Hash the rest and compare.

        Raises:
            CheckpointError: a file is not what it was when it was saved.
        """
        for name, record in self._records.items():
            self._hash(name, record.size_bytes)
        self._thread.finish()
        problems = [
            f"{name} has changed: its SHA-256 is not the manifest's"
            for name, record in self._records.items()
            if self._digests[name].hexdigest() != record.sha256
        ]
        if problems:
            raise _damaged(self._reader.path, problems)

    def _hash(self, name: str, end: int) -> None:
        begin = self._done[name]
        if end > begin:
            self._thread.add(self._digests[name], self._reader.open(name), begin, end - begin)
            self._done[name] = end


class _Window(io.RawIOBase):
    """Presents a part of a file as a file."""

    def __init__(self, descriptor: int, place: Place) -> None:
        self._descriptor, self._place, self._position = descriptor, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._place.num_bytes}
        self._position = bases[whence] + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        room = max(0, min(len(view), self._place.num_bytes - self._position))
        count = os.preadv(self._descriptor, [view[:room]], self._place.begin + self._position)
        self._position += count
        return count


def _check_chunk(chunk: Any, key: str, stored: StoredTensor, box: Box) -> None:
    """Refuse a chunk that differs from what the metadata says."""
    found = (tuple(chunk.shape), chunk.dtype) if isinstance(chunk, torch.Tensor) else type(chunk)
    if found != (box[1], stored.dtype):
        raise CheckpointError(
            f"the chunk of {key} at {box[0]} is {found}, the metadata says {box[1]} of"
            f" {stored.dtype}; the checkpoint is damaged, take another"
        )


def _common(left: Box, right: Box) -> Box:
    """Return the intersection of two boxes; a size of 0 or less means that it is empty."""
    begins = tuple(map(max, left[0], right[0]))
    ends = map(min, _ends(left), _ends(right))
    return begins, tuple(end - begin for begin, end in zip(begins, ends, strict=True))


def _ends(box: Box) -> list[int]:
    return [start + size for start, size in zip(*box, strict=True)]


def _volume(box: Box) -> int:
    return math.prod(max(0, size) for size in box[1])


def _window(box: Box, *, within: Box) -> tuple[slice, ...]:
    """Return the index of a box in the tensor of an enclosing box."""
    begins: Sequence[int] = [a - b for a, b in zip(box[0], within[0], strict=True)]
    return tuple(slice(b, b + size) for b, size in zip(begins, box[1], strict=True))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def _damaged(path: Path, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {'; '.join(problems[:5])}; take another checkpoint with --iteration"
    )
