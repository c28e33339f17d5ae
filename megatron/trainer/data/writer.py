"""Writes a token file: PREFIX.idx and PREFIX.bin, complete or not at all.

The bytes are those of megatron-core's IndexedDatasetBuilder (a test compares them). Ours needs
neither torch nor megatron-core, whose import costs each worker process seconds, and keeps lengths
in a file: memory does not grow with the number of documents.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.index_file import MAGIC, TOKEN_DTYPES, VERSION
from megatron.trainer.data.indexed import TokenFile, open_tokens
from megatron.trainer.data.token_manifest import read_manifest, remove_manifest
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import sync_file

LENGTH_DTYPE = np.dtype("<i4")
"""Of a document's length in tokens, as the index stores it."""

_LARGEST_LENGTH = 2**31 - 1
_BLOCK_DOCUMENTS = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Return uint16 when every id fits with room to spare, else int32; megatron-core's rule."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenFileWriter:
    """Writes documents of one sequence each; as a context manager, leaves nothing half-written.

    Both files grow under temporary names beside the target. `finish` verifies them as a reader
    would, then renames: first the .bin, the .idx last. A prefix without .idx is refused by
    `open_tokens`, so a death in between cannot pass for a finished file. The manifest of files that
    it replaces is removed before.

    Raises:
        DataError: Where the manifest belongs is a file that is none.
    """

    def __init__(self, prefix: str, *, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_documents = 0
        """Documents written so far."""
        self._temporary = f"{prefix}.tmp-{os.getpid()}"
        read_manifest(prefix)  # raises before the work, not after it
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = open(f"{self._temporary}.bin", "wb")
        self._lengths: BinaryIO = open(f"{self._temporary}.len", "w+b")

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bin.close()
        self._lengths.close()
        for suffix in (".bin", ".idx", ".len"):
            Path(self._temporary + suffix).unlink(missing_ok=True)

    @property
    def num_tokens(self) -> int:
        """Return the tokens written so far."""
        return self._bin.tell() // self.dtype.itemsize

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document.

        Args:
            ids: Its token ids, each 0 to vocab_size - 1.

        Raises:
            DataError: The document is longer than the format can say.
        """
        if len(ids) > _LARGEST_LENGTH:
            raise DataError(
                f"document {self.num_documents} has {len(ids)} tokens; the format stores lengths"
                f" as int32, at most {_LARGEST_LENGTH}; split the document"
            )
        self._bin.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self._lengths.write(len(ids).to_bytes(LENGTH_DTYPE.itemsize, "little"))
        self.num_documents += 1

    def finish(self) -> TokenFile:
        """Write the index, verify both files, move them to their names, and open them.

        Raises:
            DataError: The files do not verify: nothing was written, or an id is out of range.
        """
        sync_file(self._bin)
        write_index(Path(f"{self._temporary}.idx"), self._lengths, dtype=self.dtype)
        open_tokens(self._temporary, vocab_size=self.vocab_size)
        remove_manifest(self.prefix)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary + suffix, self.prefix + suffix)
        return open_tokens(self.prefix)


def write_index(path: Path, lengths: BinaryIO, *, dtype: np.dtype[np.integer]) -> None:
    """Write the .idx of documents of one sequence each; see `index_file` for the layout.

    Args:
        path: The .idx.
        lengths: A file of LENGTH_DTYPE, the tokens of each document; read three times in blocks.
        dtype: Of the tokens.
    """
    code = next(key for key, value in TOKEN_DTYPES.items() if np.dtype(value) == dtype)
    count = lengths.seek(0, os.SEEK_END) // LENGTH_DTYPE.itemsize
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, count, count + 1))
        for block in _blocks(lengths):
            file.write(block.tobytes())
        start = 0
        for block in _blocks(lengths):
            ends = start + np.cumsum(block, dtype=np.int64) * dtype.itemsize
            file.write((ends - block.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, count + 1, _BLOCK_DOCUMENTS):
            bounds = np.arange(first, min(first + _BLOCK_DOCUMENTS, count + 1), dtype="<i8")
            file.write(bounds.tobytes())
        sync_file(file)


def _blocks(lengths: IO[bytes]) -> Iterator[npt.NDArray[np.int32]]:
    lengths.seek(0)
    while block := lengths.read(_BLOCK_DOCUMENTS * LENGTH_DTYPE.itemsize):
        yield np.frombuffer(block, LENGTH_DTYPE)
