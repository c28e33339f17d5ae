"""Appends to, cuts and reads files of records, one JSON object a line, in constant memory.

Iterations never fall in a file that is cut: a run that goes back cuts its records first.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron.trainer.errors import UserError

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

MAX_LINE_BYTES = 1 << 26
"""A longer line is no record: the loads of 100 layers of 10,000 experts take an eighth of it."""
_BLOCK_BYTES = 1 << 16


class RecordError(UserError):
    """Reports a file of records that its rank cannot write."""

    is_local = True


def append_record(path: Path, record: Record) -> None:
    """Append one line of JSON; NaN and infinity become null, which JSON can hold.

    A line that a killed process left unfinished is ended first, so it spoils no other.

    Raises:
        RecordError: it cannot be written.
    """
    line = json.dumps(_finite(record)).encode() + b"\n"
    with _writing(path), path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; none if there is no file.

    What a killed run left unfinished, or is no record, is skipped with a warning.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in read_lines(file):
            record = parse_record(line)
            if record is None:
                logger.warning("%s: skipped an unfinished record: %.60s", path, _shown(line))
            else:
                yield record


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the remaining lines with their ends; those above MAX_LINE_BYTES in pieces."""
    return iter(lambda: file.readline(MAX_LINE_BYTES), b"")


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Parse a line; return None if it is unfinished or holds something else."""
    try:
        record = json.loads(line if isinstance(line, str) else line.decode(errors="replace"))
    except (ValueError, RecursionError):  # also of numbers too long, and of too much nesting
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if is_record else None


def read_backwards(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of an open file, last first; what is no record is skipped.

    Yields:
        The position behind the record's line, and the record.
    """
    for start, stop in _lines_backwards(file):
        if stop - start > MAX_LINE_BYTES:
            continue
        file.seek(start)
        record = parse_record(file.read(stop - start))
        if record is not None:
            yield stop, record


def keep_records_until(path: Path, iteration: int) -> None:
    """Cut a file behind its last record of at most `iteration` steps; do nothing without a file.

    It is cut in place, at once: a process that is killed leaves it as it was, or cut. Its
    iterations must not fall; in `events.jsonl`, which is never cut, they may.

    Raises:
        RecordError: it cannot be written.
    """
    if not path.exists():
        return
    with _writing(path), path.open("r+b") as file:
        kept = (stop for stop, record in read_backwards(file) if record["iteration"] <= iteration)
        file.truncate(next(kept, 0))


def has_evaluation(path: Path, iteration: int) -> bool:
    """Return whether a file of metrics holds an evaluation after `iteration` steps."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        for _, record in read_backwards(file):
            if record["iteration"] < iteration:
                return False
            if record["iteration"] == iteration and "valid_loss" in record:
                return True
    return False


def scalars(record: Record, prefix: str = "") -> dict[str, float]:
    """Flatten a record to its numbers, nested ones under `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


def _lines_backwards(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield where each line starts and stops, its newline included, last line first."""
    stop = block_start = file.seek(0, os.SEEK_END)
    while block_start > 0:
        block_stop, block_start = block_start, max(0, block_start - _BLOCK_BYTES)
        file.seek(block_start)
        block = file.read(block_stop - block_start)
        newline = block.rfind(b"\n")
        while newline >= 0:
            start = block_start + newline + 1
            if start < stop:  # else it ends the last line of the file
                yield start, stop
            stop = start
            newline = block.rfind(b"\n", 0, newline)
    if stop > 0:
        yield 0, stop


def _shown(line: bytes) -> str:
    return line[:200].decode(errors="replace").rstrip("\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file in an error of the file system."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror}; make room for it, or let this user write"
            " there, and start the run again with --load: it goes on from its newest checkpoint"
        ) from error


def _finite(value: Any) -> Any:
    """Replace floats that are not finite by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
