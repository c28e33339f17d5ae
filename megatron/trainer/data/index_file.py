"""Verifies and maps PREFIX.idx, in memory that does not grow with its documents.

Layout, little-endian: 9 bytes of magic, u64 version (1), u8 dtype code, u64 number of sequences n,
u64 number of document bounds d, int32[n] sequence lengths in tokens, int64[n] byte offsets into the
.bin, int64[d] document bounds in sequences, from 0 to n. Source:
`megatron.core.datasets.indexed_dataset`, read at version 0.16.1; its own reader trusts all of this,
so a damaged file there ends in an assertion or in wrong tokens.

A verification reads blocks, for mapped pages would count as memory of this process; a look-up maps,
for it touches a few pages. Arrays in the map are not aligned: NumPy's `searchsorted` and `take`
would copy them whole.
"""

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_DTYPES: dict[int, type[np.signedinteger[Any] | np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Integer dtypes by the code in the header; 6 and 7 are floats, which no token is."""

REBUILD = "write it again with tools/preprocess_data.py or copy it again"

_HEADER = struct.Struct("<9sQBQQ")
_BLOCK_ITEMS = 1 << 18
_WINDOW_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """Holds the numbers at the start of an .idx, which agree with its size."""

    path: Path
    dtype: np.dtype[np.integer]
    """How a token is stored."""
    num_sequences: int
    num_bounds: int

    @property
    def num_documents(self) -> int:
        """Return the documents in the index, empty ones included."""
        return max(0, self.num_bounds - 1)

    @property
    def offsets_at(self) -> int:
        """Return where the byte offsets begin."""
        return _HEADER.size + 4 * self.num_sequences

    @property
    def bounds_at(self) -> int:
        """Return where the document bounds begin."""
        return _HEADER.size + 12 * self.num_sequences


def read_header(path: Path) -> IndexHeader:
    """Read the header of an .idx.

    Raises:
        DataError: Magic, version or dtype code is wrong, or the size is not what the counts take.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise DataError(
            f"{path} has {size} bytes, but the header alone has {_HEADER.size}; {REBUILD}"
        )
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise DataError(
            f"{path} begins with {magic!r}, but an index begins with {MAGIC!r}; {REBUILD}"
        )
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only {VERSION} can be read; {REBUILD}")
    if code not in TOKEN_DTYPES:
        codes = ", ".join(f"{key} ({np.dtype(TOKEN_DTYPES[key])})" for key in TOKEN_DTYPES)
        raise DataError(f"{path} has dtype code {code}; tokens must be one of {codes}; {REBUILD}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but {num_sequences} sequences and {num_bounds} document"
            f" bounds take {expected} bytes; both must agree; {REBUILD}"
        )
    return IndexHeader(
        path=path,
        dtype=np.dtype(TOKEN_DTYPES[code]).newbyteorder("<"),
        num_sequences=num_sequences,
        num_bounds=num_bounds,
    )


def sum_lengths(header: IndexHeader, digest: "hashlib._Hash") -> int:
    """Return the tokens of all sequences; the first of the two passes over an .idx.

    Args:
        header: Of the .idx.
        digest: Gets the header and the lengths.

    Raises:
        DataError: A length is negative.
    """
    total = 0
    with open(header.path, "rb") as file:
        digest.update(file.read(_HEADER.size))
        for at, lengths in read_blocks(file, "<i4", header.num_sequences, block=_BLOCK_ITEMS):
            digest.update(lengths.data)
            if int(lengths.min()) < 0:
                place = int(np.argmax(lengths < 0))
                raise DataError(
                    f"{header.path}: sequence {at + place} has length {int(lengths[place])};"
                    f" lengths must be >= 0; {REBUILD}"
                )
            total += int(lengths.sum(dtype=np.int64))
    return total


def check_places(header: IndexHeader, digest: "hashlib._Hash") -> None:
    """Check offsets and bounds; the second pass, after `sum_lengths`.

    Args:
        header: Of the .idx, whose lengths are right and add up to what the .bin holds.
        digest: Gets the offsets and the bounds.

    Raises:
        DataError: Offsets are not the running sum of the lengths in bytes, or bounds do not rise
            from 0 to the number of sequences.
    """
    count = header.num_sequences
    with open(header.path, "rb") as file, open(header.path, "rb") as beside:
        beside.seek(_HEADER.size)
        file.seek(header.offsets_at)
        lengths = read_blocks(beside, "<i4", count, block=_BLOCK_ITEMS)
        end = 0
        for at, offsets in read_blocks(file, "<i8", count, block=_BLOCK_ITEMS):
            digest.update(offsets.data)
            end = _check_offsets(header, at, next(lengths)[1], offsets, end)
        _check_ends(file, header)
        before: int | None = None
        for at, bounds in read_blocks(file, "<i8", header.num_bounds, block=_BLOCK_ITEMS):
            digest.update(bounds.data)
            before = _check_bounds(header, at, bounds, before)


def read_blocks(
    file: BinaryIO, dtype: npt.DTypeLike, count: int, *, block: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the next `count` items of a file in blocks, each with its first item's number.

    Raises:
        DataError: The file has become shorter meanwhile.
    """
    for at in range(0, count, block):
        items = np.empty(min(block, count - at), dtype)
        if file.readinto(items.view(np.uint8)) != items.nbytes:  # type: ignore[attr-defined]
            raise DataError(f"{file.name} was cut off while it was read; {REBUILD}")
        yield at, items


def _check_offsets(
    header: IndexHeader,
    at: int,
    lengths: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    end: int,
) -> int:
    """Check a block of offsets against lengths; return where the last sequence of it ends.

    Args:
        header: Of the .idx.
        at: Number of the block's first sequence.
        lengths: [m] tokens of each of its sequences.
        offsets: [m] where each begins, in bytes.
        end: Where the sequence before it ends, in tokens.
    """
    ends = np.cumsum(lengths, dtype=np.int64) + end  # [m]
    expected = (ends - lengths) * header.dtype.itemsize  # [m]
    wrong = offsets != expected
    if wrong.any():
        place = int(np.argmax(wrong))
        raise DataError(
            f"{header.path}: sequence {at + place} starts at byte {int(offsets[place])}, but the"
            f" lengths before it end at byte {int(expected[place])}; both must agree; {REBUILD}"
        )
    return int(ends[-1])


def _check_ends(file: BinaryIO, header: IndexHeader) -> None:
    """Raise DataError unless document bounds go from 0 to the number of sequences."""
    ends: tuple[int | None, int | None] = (None, None)
    if header.num_bounds:
        last = header.bounds_at + 8 * (header.num_bounds - 1)
        first, final = (os.pread(file.fileno(), 8, at) for at in (header.bounds_at, last))
        ends = (
            int.from_bytes(first, "little", signed=True),
            int.from_bytes(final, "little", signed=True),
        )
    if ends != (0, header.num_sequences):
        raise DataError(
            f"{header.path}: document bounds go from {ends[0]} to {ends[1]}; they must go from 0 to"
            f" the number of sequences, {header.num_sequences}; {REBUILD}"
        )


def _check_bounds(
    header: IndexHeader, at: int, bounds: npt.NDArray[np.int64], before: int | None
) -> int:
    """Check that bounds of a block do not fall, nor from the block before; return the last.

    Args:
        header: Of the .idx.
        at: Number of the block's first bound.
        bounds: [m] in sequences.
        before: The last bound before the block; None at its beginning.
    """
    first = int(bounds[0])
    falls = np.flatnonzero(bounds[1:] < bounds[:-1])
    if before is not None and first < before:
        _refuse_fall(header, at - 1, before, first)
    if falls.size:
        place = int(falls[0])
        _refuse_fall(header, at + place, int(bounds[place]), int(bounds[place + 1]))
    return int(bounds[-1])


def _refuse_fall(header: IndexHeader, document: int, first: int, stop: int) -> None:
    raise DataError(
        f"{header.path}: document {document} goes from sequence {first} to {stop}; document bounds"
        f" must not fall; {REBUILD}"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentStarts:
    """Looks up where documents begin, in the map of a verified .idx; ranks of a node share it."""

    header: IndexHeader
    offsets: npt.NDArray[np.int64]
    """[n] byte offset of each sequence, mapped."""
    bounds: npt.NDArray[np.int64]
    """[d] document bounds in sequences, mapped."""
    num_tokens: int
    """Tokens of all documents, which is where empty ones at the end begin."""

    def __len__(self) -> int:
        return self.header.num_documents

    def __getitem__(self, documents: slice) -> npt.NDArray[np.int64]:
        """Return the positions of the first tokens of some documents."""
        sequences = self.bounds[:-1][documents]
        positions = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        is_there = sequences < self.header.num_sequences
        positions[is_there] = self.offsets[sequences[is_there]] // self.header.dtype.itemsize
        return positions

    def bound(self, n: int) -> int:
        """Return the position of document n's first token, which is also where n - 1 ends."""
        sequence = int(self.bounds[n])
        if sequence >= self.header.num_sequences:
            return self.num_tokens
        return int(self.offsets[sequence]) // self.header.dtype.itemsize

    def first_from(self, token: int) -> int:
        """Return the number of the first document that begins at `token` or after it."""
        return bisect_left(range(len(self)), token, key=self.bound)

    def between(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the positions from `first` on and before `stop` at which documents begin."""
        parts = []
        begin = self.first_from(first)
        while True:
            found = self[begin : begin + _WINDOW_DOCUMENTS]
            parts.append(found[: np.searchsorted(found, stop)])
            begin += len(found)
            if not len(found) or found[-1] >= stop:
                return np.concatenate(parts)


def map_starts(header: IndexHeader, *, num_tokens: int) -> DocumentStarts:
    """Map a verified .idx of documents that have `num_tokens` tokens in all."""
    raw = np.memmap(header.path, dtype=np.uint8, mode="r")
    count, at = header.num_sequences, header.offsets_at
    return DocumentStarts(
        header=header,
        offsets=np.frombuffer(raw, dtype="<i8", count=count, offset=at),
        bounds=np.frombuffer(raw, dtype="<i8", count=header.num_bounds, offset=header.bounds_at),
        num_tokens=num_tokens,
    )
