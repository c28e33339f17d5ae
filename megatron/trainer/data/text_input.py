"""Opens inputs of text: files, pipes and standard input, plain or compressed."""

import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from megatron.trainer.errors import DataError

STANDARD_INPUT = "-"
"""The path that means standard input."""
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading an opened input raises where its medium, or its compressed data, is damaged."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""The last three of the four bytes that begin a frame that holds no data."""
_OTHERS = {
    b"BZh": ("a bzip2 file", "give what `bzip2 -dc` makes of it to --input -"),
    b"\xfd7zXZ": ("an xz file", "give what `xz -dc` makes of it to --input -"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"PAR1": ("a Parquet file", "write its rows as JSON Lines"),
}
_MAGIC_BYTES = 8
MOST_RATIO = 500
"""How many times its size an input may unpack to, beyond `FREE_BYTES`; text stays below 100."""
FREE_BYTES = 1 << 28
_ZSTD_PIECE_BYTES = 1 << 8
"""A few bytes can stand for a block of 128 KiB; so many of them become 8 MiB at most."""


class TextInput:
    """Opens an input, as often as it is read.

    A pipe can be read only once: its bytes are copied into a temporary file where they will be
    read again.

    Args:
        path: A file, a pipe, or `-`.
        is_reread: Whether it will be opened several times.
    """

    def __init__(self, path: str, *, is_reread: bool = False) -> None:
        self.name = "standard input" if path == STANDARD_INPUT else path
        self._path = path
        self._is_reread = is_reread
        self._copy: BinaryIO | None = None
        self._was_opened = False
        self._rejoined: _Rejoined | None = None

    @property
    def num_packed_bytes(self) -> int:
        """Return how far the latest opening has been read, in bytes before decompression."""
        return self._rejoined.num_read if self._rejoined is not None else 0

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the input from its start, and decompress what its first bytes show is compressed.

        Raises:
            DataError: There is no such input, it cannot be read (again), or holds another format.
        """
        if self._copy is not None:
            self._copy.seek(0)
            yield self._decompressed(self._copy)
            return
        if self._was_opened and is_pipe(self._path):
            raise DataError(
                f"{self.name} is a pipe, which was read already; it can be read only once; write"
                " it to a file, and name that"
            )
        self._was_opened = True
        with self._open_bytes() as file:
            if self._is_reread and is_pipe(self._path):
                self._copy = file = self._copied(file)
            yield self._decompressed(file)

    @contextmanager
    def _open_bytes(self) -> Iterator[BinaryIO]:
        if self._path == STANDARD_INPUT:
            if sys.stdin is None:
                raise DataError("standard input is closed; --input - reads it; name a file")
            yield sys.stdin.buffer
            return
        if not (os.path.isfile(self._path) or is_pipe(self._path)):
            raise DataError(
                f"{self.name} does not exist or is not a file; an input must be a JSON Lines file;"
                " check the path"
            )
        try:
            file = open(self._path, "rb")
        except OSError as error:
            raise DataError(
                f"{self.name} cannot be read: {error.strerror or error}; check its permissions"
            ) from error
        with file:
            yield file

    def _copied(self, file: BinaryIO) -> BinaryIO:
        copy = tempfile.TemporaryFile()
        weakref.finalize(self, copy.close)
        try:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.seek(0)
        except OSError as error:
            raise DataError(
                f"{self.name} is a pipe and is read several times, but cannot be copied to"
                f" {tempfile.gettempdir()}: {error.strerror or error}; write it to a file and name"
                " that, or let TMPDIR name a directory with more space"
            ) from error
        return copy

    def _decompressed(self, file: BinaryIO) -> BinaryIO:
        """Return the stream to read: by its first bytes, whatever its name says."""
        try:
            start = file.read(_MAGIC_BYTES)
        except OSError as error:
            raise DataError(
                f"{self.name} cannot be read: {error.strerror or error}; check the file"
            ) from error
        for magic, (kind, remedy) in _OTHERS.items():
            if start.startswith(magic):
                raise DataError(
                    f"{self.name} is {kind}; an input must be JSON Lines, plain or compressed with"
                    f" gzip or zstd; {remedy}"
                )
        if not start and self._path.endswith((".gz", ".zst")):
            raise DataError(
                f"{self.name} is empty; a compressed file has some bytes even where it holds no"
                " lines, so this one was cut off; restore it"
            )
        self._rejoined = _Rejoined(start, file)
        whole: BinaryIO = io.BufferedReader(self._rejoined, 1 << 16)
        try:
            found = unpack(start, whole)
        except ImportError as error:
            raise DataError(
                f"{self.name} is a zstd file, which needs the package zstandard; pip install"
                " zstandard, or give what `zstd -dc` makes of it to --input -"
            ) from error
        if found is whole:
            return whole
        return io.BufferedReader(_Bounded(found, self._rejoined, self.name), 1 << 16)


def unpack(start: bytes, packed: BinaryIO) -> BinaryIO:
    """Return the stream that gzip or zstd data hold, or other data as they are.

    Args:
        start: The first bytes, four at least where there are so many.
        packed: All of the data.

    Raises:
        ImportError: They are zstd, and its package is not installed.
    """
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=packed, mode="rb")  # type: ignore[return-value]
    if is_packed(start):
        return io.BufferedReader(_ZstdReader(packed), 1 << 16)
    return packed


def is_packed(start: bytes) -> bool:
    """Return whether data that begin so are gzip or zstd."""
    is_skippable = start[1:4] == _ZSTD_SKIPPABLE and 0x50 <= start[0] <= 0x5F
    return start.startswith((_GZIP, _ZSTD)) or is_skippable


def check_ratio(name: str, unpacked: int, packed: int) -> None:
    """Refuse a file that unpacks to far more than text does.

    Args:
        name: The file, for the message.
        unpacked: Bytes that it has unpacked to so far.
        packed: Bytes that these were.

    Raises:
        DataError: It does.
    """
    if unpacked > FREE_BYTES and unpacked > MOST_RATIO * packed:
        raise DataError(
            f"{name} unpacks to more than {unpacked:,}; {packed:,} bytes of it become so many, more"
            f" than {MOST_RATIO} times; no text does that; unpack it yourself if it is right"
        )


def check_inputs(paths: Sequence[str]) -> None:
    """Refuse a pipe that is named twice: the second reading would find nothing, or wait forever.

    Raises:
        DataError: One is.
    """
    for path in paths:
        if is_pipe(path) and paths.count(path) > 1:
            raise DataError(
                f"--input names {path} {paths.count(path)} times; a pipe can be read only once;"
                " name it once"
            )


def is_pipe(path: str) -> bool:
    """Return whether an input can be read only once."""
    if path == STANDARD_INPUT:
        return True
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


class _Rejoined(io.RawIOBase):
    """Reads a stream from its start, of which the first bytes were taken already."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start = start
        self._rest = rest
        self.num_read = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill a buffer with what comes next; return the number of bytes, 0 at the end."""
        if self._start:
            count = min(len(self._start), len(buffer))
            buffer[:count] = self._start[:count]
            self._start = self._start[count:]
        else:
            count = self._rest.readinto(buffer)  # type: ignore[attr-defined]
        self.num_read += count
        return count


class _Bounded(io.RawIOBase):
    """Reads what packed data hold, unless that is more than any text becomes."""

    def __init__(self, unpacked: BinaryIO, packed: _Rejoined, name: str) -> None:
        self._unpacked = unpacked
        self._packed = packed
        self._name = name
        self._num_read = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill a buffer with what comes next; return the number of bytes, 0 at the end.

        Raises:
            DataError: The data unpack to far more than text does.
        """
        # Not readinto, which would lose what comes before damaged data.
        count: int = self._unpacked.readinto1(buffer)  # type: ignore[attr-defined]
        self._num_read += count
        check_ratio(self._name, self._num_read, self._packed.num_read)
        return count


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames, one after the other, and notices where the last one is cut off.

    The library's own stream reader takes a cut for the end, and its decompressor has no bound on
    what it makes of one piece: pieces are small therefore.
    """

    def __init__(self, source: BinaryIO) -> None:
        import zstandard

        self._source = source
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._waiting = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fill a buffer with what comes next; return the number of bytes, 0 at the end.

        Raises:
            EOFError: The last frame is not complete.
            OSError: The data are damaged, or need more memory than a frame may.
        """
        while not self._ready:
            piece = self._waiting or self._source.read(_ZSTD_PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj(write_size=1 << 16)
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise OSError(str(error)) from error
            self._waiting = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
