"""Reads documents with their metadata from JSON Lines, Parquet and Arrow files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from megatron.trainer.data.jsonl import parse_object, text_under
from megatron.trainer.data.text_input import check_ratio
from megatron.trainer.errors import DataError
from moe_app.data.sources import SourceFile
from moe_app.filter import binary_lines

_ROWS_AT_ONCE = 64
_BYTES_AT_ONCE = 1 << 28
"""Of rows decoded together. Thousands of rows may be one value, which is in the file once; a value
has at most the bytes that its row group is said to unpack to, or its batch holds."""


@dataclass(frozen=True)
class Entry:
    """Holds one document as it was read."""

    line: int
    """Its line in a JSON Lines file, or row in a table, counted from 1."""
    value: dict[str, Any]
    text: str
    raw: bytes | None
    """The line it was read from; None for a row."""


@dataclass(frozen=True)
class BadEntry:
    """Locates a line or row that holds no document."""

    line: int
    problem: str


def read_entries(source: SourceFile, *, text_key: str) -> Iterator[Entry | BadEntry]:
    """Yield a file's documents in order, and what is none of them.

    Blank lines are passed over.

    Args:
        source: The file.
        text_key: Where in a document its text is.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    for line, raw, value in read_rows(source):
        if isinstance(value, str):
            yield BadEntry(line, value)
            continue
        try:
            where = f"{source.path}, line {line}"
            text = text_under(text_key, value, where=where, flag="--text-key")
        except DataError as error:
            yield BadEntry(line, str(error))
        else:
            yield Entry(line, value, text, raw)


NumberedRow = tuple[int, bytes | None, dict[str, Any] | str]
"""Number, the bytes read if any, and the object, or what is wrong."""


def read_rows(source: SourceFile, *, most_line_bytes: int | None = None) -> Iterator[NumberedRow]:
    """Yield a file's objects in order, and what is none of them.

    Blank lines are passed over.

    Args:
        source: The file.
        most_line_bytes: Of a line of JSON, or a row; None means as much as a document may have.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    most_bytes = most_line_bytes or binary_lines.MOST_LINE_BYTES
    if source.kind == "jsonl":
        return _json_lines(source, most_bytes)
    return _table_rows(source, most_bytes)


def _json_lines(source: SourceFile, most_bytes: int) -> Iterator[NumberedRow]:
    for number, line in binary_lines.read_bounded_lines(source.path, most_line_bytes=most_bytes):
        if line is None:
            yield (
                number,
                None,
                f"{source.path}, line {number}: has more than {most_bytes:,} bytes; each line"
                " must be one JSON object of at most that size; split the document",
            )
        elif line.strip():
            try:
                value = parse_object(line, path=source.path, number=number)
            except DataError as error:
                yield number, line, str(error)
            else:
                yield number, line, value


def _table_rows(source: SourceFile, most_bytes: int) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet or Arrow file.

    Raises:
        DataError: It is none, or unpacks to far more than text does.
    """
    import pyarrow

    number = 0
    try:
        for batch in _batches(source):
            step = _rows_at_once(batch.nbytes)
            for start in range(0, batch.num_rows, step):
                for row in _rows(batch.slice(start, step), most_bytes):
                    number += 1
                    where = f"{source.path}, row {number}"
                    yield number, None, row if isinstance(row, dict) else f"{where}: {row}"
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{source.path}, after row {number}: cannot be read as {source.kind} ({error}); restore"
            " the file"
        ) from error


def _batches(source: SourceFile) -> Iterator[Any]:
    if source.kind == "parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(source.path) as file:
            groups = [file.metadata.row_group(each) for each in range(file.num_row_groups)]
            sizes = [each.total_byte_size for each in groups]
            check_ratio(source.path, sum(sizes), source.size)
            for group, size in enumerate(sizes):
                yield from file.iter_batches(batch_size=_rows_at_once(size), row_groups=[group])
        return
    import pyarrow

    with pyarrow.memory_map(source.path) as mapped:
        yield from pyarrow.ipc.open_stream(mapped)


def _rows_at_once(num_bytes: int) -> int:
    """Return how many rows to decode together, each of which may have `num_bytes`."""
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, num_bytes)))


def _rows(batch: Any, most_bytes: int) -> Iterator[dict[str, Any] | str]:
    """Yield a batch's rows; where one cannot be read or is too large, what is wrong with it."""
    if batch.nbytes > most_bytes:
        if batch.num_rows == 1:
            yield (
                f"has more than {most_bytes:,} bytes; each row must have at most that many; split"
                " the document"
            )
            return
        for index in range(batch.num_rows):
            yield from _rows(batch.slice(index, 1), most_bytes)
        return
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield f"not UTF-8 ({error}); repair or remove the row"
            return
        for index in range(batch.num_rows):
            yield from _rows(batch.slice(index, 1), most_bytes)
        return
    yield from rows


def json_line(value: dict[str, Any]) -> bytes:
    """Return a document as a JSON line.

    Raises:
        DataError: It holds what JSON has no form for.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, in metadata
        return json.dumps(value, default=_plain).encode("ascii") + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, date | time):
        return value.isoformat()
    raise DataError(
        f"a document holds a {type(value).__name__}, which JSON has no form for; drop that column"
    )
