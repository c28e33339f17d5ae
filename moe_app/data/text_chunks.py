"""Cuts what is read into chunks of about a megabyte at line ends, the unit of work.

A worker reads the chunks of a plain file itself; those of a compressed file or a pipe come with
their bytes, which one process unpacks.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from megatron.trainer.data import jsonl
from megatron.trainer.data.text_input import UNREADABLE, TextInput
from megatron.trainer.errors import DataError
from moe_app.data.text_inputs import Input, Segment

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Names whole lines of one input."""

    segment: int
    """Place of the segment they are of."""
    name: str
    """The input, for messages."""
    start: int
    """Where the lines begin in the input, unpacked."""
    stop: int
    """Where they end."""
    lines: bytes | None
    """Their bytes; None for those of a plain file of this name."""
    is_cut: bool = False
    """Whether the last line goes on after them, and is longer than any may be."""
    num_done: int
    """Bytes of all inputs, as they lie on disk, up to here."""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the lines."""
        if self.lines is not None:
            yield io.BytesIO(self.lines)
            return
        with open(self.name, "rb") as file:
            file.seek(self.start)
            yield file


@dataclass(frozen=True)
class Position:
    """Says what is to be read next."""

    segment: int
    offset: int
    """In the input, unpacked."""


def read_chunks(
    inputs: Sequence[Input],
    segments: Sequence[Segment],
    texts: Mapping[int, TextInput],
    begin: Position,
) -> Iterator[Chunk]:
    """Yield the chunks of all segments, in order.

    Args:
        inputs: All inputs.
        segments: What is read of them.
        texts: Those that are not plain, by their place.
        begin: Where to begin.

    Raises:
        DataError: An input cannot be read to its end.
    """
    done = 0
    for number, segment in enumerate(segments):
        source = inputs[segment.source]
        size = (source.num_bytes or 0) if segment.stop is None else segment.stop - segment.start
        if number >= begin.segment:
            offset = begin.offset if number == begin.segment else segment.start
            reader = (
                _PackedReader(texts[segment.source])
                if segment.stop is None
                else _PlainReader(source.path, segment)
            )
            yield from reader.read(number, offset, done)
        done += size


class _PlainReader:
    """Finds the ends of lines in a plain file."""

    def __init__(self, path: str, segment: Segment) -> None:
        assert segment.stop is not None
        self._path = path
        self._first = segment.start
        self._stop = segment.stop

    def read(self, number: int, start: int, done: int) -> Iterator[Chunk]:
        """Yield the chunks from a byte on."""
        with open(self._path, "rb") as file:
            while start < self._stop:
                at = min(start + _CHUNK_BYTES, self._stop)
                stop, is_whole = self._line_end(file, at, at + jsonl.MOST_LINE_BYTES)
                yield Chunk(
                    segment=number,
                    name=self._path,
                    start=start,
                    stop=stop,
                    lines=None,
                    is_cut=not is_whole,
                    num_done=done + stop - self._first,
                )
                start = stop if is_whole else self._line_end(file, stop, self._stop)[0]

    def _line_end(self, file: BinaryIO, at: int, most: int) -> tuple[int, bool]:
        """Return where a line ends at or after a byte, and whether it does before another one."""
        if at >= self._stop:
            return self._stop, True
        at -= 1
        file.seek(at)
        while block := file.read(_BLOCK_BYTES):
            found = block.find(b"\n")
            if found >= 0:
                return min(at + found + 1, self._stop), True
            at += len(block)
            if most < at < self._stop:
                return at, False
        return self._stop, True


class _PackedReader:
    """Reads what is read from its beginning on: compressed files and pipes."""

    def __init__(self, text: TextInput) -> None:
        self._text = text
        self._num_lines = 0

    def read(self, number: int, start: int, done: int) -> Iterator[Chunk]:
        """Yield the chunks from a byte on, of the unpacked bytes."""
        with self._text.open() as opened:
            file = cast(io.BufferedReader, opened)
            self._pass_over(file, start)
            while True:
                lines, is_cut = self._next_lines(file)
                if not lines:
                    return
                stop = start + len(lines)
                yield Chunk(
                    segment=number,
                    name=self._text.name,
                    start=start,
                    stop=stop,
                    lines=lines,
                    is_cut=is_cut,
                    num_done=done + self._text.num_packed_bytes,
                )
                start = stop + (self._pass_line(file) if is_cut else 0)

    def _pass_over(self, file: io.BufferedReader, count: int) -> None:
        while count > 0:
            block = self._read(file, min(count, _BLOCK_BYTES))
            if not block:
                raise DataError(f"{self._text.name} is shorter than it was; restore it")
            count -= len(block)

    def _next_lines(self, file: io.BufferedReader) -> tuple[bytes, bool]:
        """Return whole lines, and whether the last of them goes on, longer than any may be."""
        blocks = []
        size = 0
        while size < _CHUNK_BYTES and (block := self._read(file, _BLOCK_BYTES)):
            blocks.append(block)
            size += len(block)
        most = jsonl.MOST_LINE_BYTES
        while blocks and size <= _CHUNK_BYTES + most and not blocks[-1].endswith(b"\n"):
            with self._reading():
                block = file.readline(_BLOCK_BYTES)
            if not block:
                break
            self._num_lines += block.endswith(b"\n")
            blocks.append(block)
            size += len(block)
        else:
            return b"".join(blocks), bool(blocks) and not blocks[-1].endswith(b"\n")
        return b"".join(blocks), False

    def _pass_line(self, file: io.BufferedReader) -> int:
        """Read on to the end of a line; return how many bytes these are."""
        count = 0
        while True:
            with self._reading():
                block = file.readline(_BLOCK_BYTES)
            count += len(block)
            if not block or block.endswith(b"\n"):
                return count

    def _read(self, file: io.BufferedReader, size: int) -> bytes:
        with self._reading():
            block = file.read1(size)
        self._num_lines += block.count(b"\n")
        return block

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the line at which an input cannot be read."""
        try:
            yield
        except UNREADABLE as error:
            raise DataError(
                f"{self._text.name}, line {self._num_lines + 1}: cannot be read"
                f" ({error or type(error).__name__}); the data are damaged or cut off; restore the"
                " input"
            ) from error
