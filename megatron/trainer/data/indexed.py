"""Verifies and maps a token file: PREFIX.idx and PREFIX.bin in Megatron's indexed format.

Layout of the .idx, little-endian: 9 bytes of magic, u64 version (1), u8 dtype code, u64 number of
sequences n, u64 number of document bounds d, int32[n] sequence lengths in tokens, int64[n] byte
offsets into the .bin, int64[d] document bounds in sequences, from 0 to n. The .bin holds the tokens
and nothing else. Source: `megatron.core.datasets.indexed_dataset`, read at version 0.16.1; its own
reader trusts all of this, so a damaged file there ends in an assertion or in wrong tokens.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.fingerprint import fingerprint
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

_HEADER = struct.Struct("<9sQBQQ")
_REBUILD = "write it again with tools/preprocess_data.py or copy it again"
_SCAN_TOKENS = 1 << 24
# Reading more at start, on every rank, would delay a run by minutes and more.
_FULL_SCAN_TOKENS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """Describes the content of a token file."""

    dtype: str
    """How a token is stored."""
    num_documents: int
    """Documents in the index, empty ones included."""
    num_tokens: int
    """Tokens in all of them."""
    fingerprint: str
    """What tells it from another file of its size; see `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Holds a verified token file, mapped read-only."""

    prefix: str
    """Path without .bin and .idx."""
    tokens: npt.NDArray[np.integer]
    """[num_tokens] every token of the file, a memory map."""
    document_starts: npt.NDArray[np.int64]
    """[num_documents] position of each document's first token."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens in the file."""
        return int(self.tokens.shape[0])

    @property
    def num_documents(self) -> int:
        """Return the documents in the file."""
        return int(self.document_starts.shape[0])

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Return how a token is stored."""
        return self.tokens.dtype

    @cached_property
    def facts(self) -> TokenFacts:
        """Return what the file's content is, read in part for its fingerprint."""
        return TokenFacts(
            dtype=self.dtype.name,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            fingerprint=fingerprint(Path(f"{self.prefix}.idx"), self.tokens),
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check every token against the vocabulary.

        Args:
            vocab_size: Token ids the model has an embedding for.

        Raises:
            DataError: A token is negative or not below vocab_size; names the first one.
        """
        info = np.iinfo(self.dtype)
        if info.min == 0 and info.max < vocab_size:
            return
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            check_ids(
                self.tokens[start : start + _SCAN_TOKENS],
                vocab_size,
                file=f"{self.prefix}.bin",
                first_token=start,
            )


def check_ids(
    ids: npt.NDArray[np.integer], vocab_size: int, *, file: str, first_token: int
) -> None:
    """Check token ids against the vocabulary.

    Args:
        ids: [n] a stretch of a token file.
        vocab_size: Token ids the model has an embedding for.
        file: Its name, for the message.
        first_token: Position of ids[0] in the file.

    Raises:
        DataError: A token is negative or not below vocab_size; names the first one.
    """
    if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
        return
    at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
    raise DataError(
        f"{file}: token {first_token + at} has id {int(ids[at])}, but the vocabulary"
        f" has {vocab_size} ids; ids must be 0 to {vocab_size - 1}; preprocess the data"
        " with this model's tokenizer or raise --vocab-size"
    )


@dataclass(frozen=True)
class _Index:
    """Holds the content of a verified .idx."""

    dtype: np.dtype[np.integer]
    lengths: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]


def open_tokens(prefix: str, *, vocab_size: int | None = None) -> TokenFile:
    """Verify PREFIX.idx and PREFIX.bin against each other and map the tokens.

    Args:
        prefix: Path without .bin and .idx.
        vocab_size: When given, every token must be below it. Files of up to 2^30 tokens are read
            through for this; larger ones are checked as they are drawn from (`WindowSource`).

    Raises:
        DataError: A file is missing, empty, truncated, too long, of another format or inconsistent,
            or holds a token outside the vocabulary.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        _require_content(path, prefix)
    index = _read_index(idx_path)
    total = int(index.lengths.sum(dtype=np.int64))
    expected_bytes = total * index.dtype.itemsize
    actual_bytes = bin_path.stat().st_size
    if actual_bytes != expected_bytes:
        raise DataError(
            f"{bin_path} has {actual_bytes} bytes, but {idx_path} describes {total} tokens of"
            f" {index.dtype.itemsize} bytes = {expected_bytes} bytes; both must agree; {_REBUILD}"
        )
    tokens = np.memmap(bin_path, dtype=index.dtype, mode="r", shape=(total,))
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])  # [n + 1]
    file = TokenFile(prefix=prefix, tokens=tokens, document_starts=ends[index.bounds[:-1]])
    if vocab_size is not None and total <= _FULL_SCAN_TOKENS:
        file.check_vocabulary(vocab_size)
    return file


def _require_content(path: Path, prefix: str) -> None:
    """Raise DataError unless path is a non-empty file."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist or is not a file; the prefix {prefix!r} must name two files,"
            " PREFIX.bin and PREFIX.idx; check the path, and give it without .bin or .idx"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"{path} has 0 bytes; a token file must hold at least one token; {_REBUILD}"
        )


def _read_index(path: Path) -> _Index:
    """Read an .idx and check everything that it says about itself.

    Raises:
        DataError: Magic, version, dtype code, size, lengths, offsets or bounds are wrong.
    """
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    if raw.size < _HEADER.size:
        raise DataError(
            f"{path} has {raw.size} bytes, but the header alone has {_HEADER.size}; {_REBUILD}"
        )
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(
            f"{path} begins with {magic!r}, but an index begins with {MAGIC!r}; {_REBUILD}"
        )
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only {VERSION} can be read; {_REBUILD}")
    if code not in TOKEN_DTYPES:
        codes = ", ".join(f"{key} ({np.dtype(TOKEN_DTYPES[key])})" for key in TOKEN_DTYPES)
        raise DataError(f"{path} has dtype code {code}; tokens must be one of {codes}; {_REBUILD}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if raw.size != expected:
        raise DataError(
            f"{path} has {raw.size} bytes, but {num_sequences} sequences and {num_bounds} document"
            f" bounds take {expected} bytes; both must agree; {_REBUILD}"
        )
    at = _HEADER.size
    lengths = np.frombuffer(raw, dtype="<i4", count=num_sequences, offset=at)
    offsets = np.frombuffer(raw, dtype="<i8", count=num_sequences, offset=at + 4 * num_sequences)
    bounds = np.frombuffer(raw, dtype="<i8", count=num_bounds, offset=at + 12 * num_sequences)
    dtype: np.dtype[np.integer] = np.dtype(TOKEN_DTYPES[code]).newbyteorder("<")
    _check_sequences(path, lengths, offsets, dtype.itemsize)
    _check_bounds(path, bounds, num_sequences)
    return _Index(dtype=dtype, lengths=lengths, bounds=bounds)


def _check_sequences(
    path: Path, lengths: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], itemsize: int
) -> None:
    """Raise DataError unless lengths are >= 0 and offsets are their running sum in bytes."""
    if lengths.size and int(lengths.min()) < 0:
        at = int(np.argmax(lengths < 0))
        raise DataError(
            f"{path}: sequence {at} has length {int(lengths[at])}; lengths must be >= 0; {_REBUILD}"
        )
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    wrong = offsets != expected
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"{path}: sequence {at} starts at byte {int(offsets[at])}, but the lengths before it"
            f" end at byte {int(expected[at])}; both must agree; {_REBUILD}"
        )


def _check_bounds(path: Path, bounds: npt.NDArray[np.int64], num_sequences: int) -> None:
    """Raise DataError unless document bounds rise from 0 to the number of sequences."""
    first, last = (int(bounds[0]), int(bounds[-1])) if bounds.size else (None, None)
    if (first, last) != (0, num_sequences):
        raise DataError(
            f"{path}: document bounds go from {first} to {last}; they must go from 0 to the number"
            f" of sequences, {num_sequences}; {_REBUILD}"
        )
    falls = np.flatnonzero(bounds[1:] < bounds[:-1])
    if falls.size:
        at = int(falls[0])
        raise DataError(
            f"{path}: document {at} goes from sequence {int(bounds[at])} to {int(bounds[at + 1])};"
            f" document bounds must not fall; {_REBUILD}"
        )
