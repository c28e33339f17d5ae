"""Writes a token file: PREFIX.idx and PREFIX.bin, complete or not at all.

The bytes are those of megatron-core's IndexedDatasetBuilder (a test compares them). Ours needs
neither torch nor megatron-core, whose import costs each worker process seconds, and keeps eight
bytes a document instead of a Python object.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.indexed import MAGIC, TOKEN_DTYPES, VERSION, TokenFile, open_tokens
from megatron.trainer.data.token_manifest import read_manifest, remove_manifest
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import sync_file

_LARGEST_LENGTH = 2**31 - 1
_BLOCK_DOCUMENTS = 1 << 20


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
        self._temporary = f"{prefix}.tmp-{os.getpid()}"
        self._lengths = array("q")
        read_manifest(prefix)  # raises before the work, not after it
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(f"{self._temporary}.bin", "wb")

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bin.close()
        for suffix in (".bin", ".idx"):
            Path(self._temporary + suffix).unlink(missing_ok=True)

    @property
    def num_documents(self) -> int:
        """Return the documents written so far."""
        return len(self._lengths)

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
        self._lengths.append(len(ids))

    def finish(self) -> TokenFile:
        """Write the index, verify both files, move them to their names, and open them.

        Raises:
            DataError: The files do not verify: nothing was written, or an id is out of range.
        """
        sync_file(self._bin)
        self._write_index(Path(f"{self._temporary}.idx"))
        open_tokens(self._temporary, vocab_size=self.vocab_size)
        remove_manifest(self.prefix)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary + suffix, self.prefix + suffix)
        return open_tokens(self.prefix)

    def _write_index(self, path: Path) -> None:
        """Write the .idx that belongs to the documents so far; see `indexed` for the layout."""
        code = next(key for key, value in TOKEN_DTYPES.items() if np.dtype(value) == self.dtype)
        lengths = np.frombuffer(self._lengths, dtype=np.int64)  # [n]
        offsets = (np.cumsum(lengths) - lengths) * self.dtype.itemsize  # [n]
        with open(path, "wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, lengths.size, lengths.size + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(offsets.astype("<i8").tobytes())
            file.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())
            sync_file(file)
