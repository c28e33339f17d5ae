"""Texts or tokens out of JSON Lines files, and files that appear under their name when whole."""

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.trainer.data.jsonl import parse_object, read_lines, valid_text
from megatron.trainer.errors import DataError

TOKENS_KEY = "tokens"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of an input."""

    where: str
    """File and line, for messages."""
    record: dict[str, Any]
    """The whole object."""
    ids: list[int]
    """Its tokens, at least one."""


def read_tokens(
    path: str,
    *,
    text_key: str,
    encode: Callable[[str], list[int]],
    vocab_size: int,
    most_tokens: int,
    rule: str,
    written_keys: Collection[str],
) -> Iterator[Line]:
    """Yield each line of a file as tokens.

    Args:
        path: JSON Lines; each object has either a text or, under "tokens", a list of ids. Its
            other keys may be anything.
        text_key: where the text is.
        encode: turns a text into ids.
        vocab_size: ids are below it.
        most_tokens: the longest line that is allowed.
        rule: why no longer ones are, for the message.
        written_keys: what will be added to the object, and must not be there.

    Raises:
        DataError: the file is missing, or a line is wrong; names the line.
    """
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        record = parse_object(line, path=path, number=number)
        taken = sorted(record.keys() & set(written_keys))
        if taken:
            raise DataError(
                f"{where}: has the key {taken[0]!r}, which is to be written; nothing is"
                " overwritten; remove or rename it"
            )
        given = [key for key in (text_key, TOKENS_KEY) if key in record]
        if len(given) != 1:
            raise DataError(
                f"{where}: has {' and '.join(repr(key) for key in given) or 'neither key'}; each"
                f" object needs one of {text_key!r} (text) and {TOKENS_KEY!r} (ids); repair or"
                " remove the line"
            )
        if given == [text_key]:
            ids = encode(valid_text(record, text_key, where=where))
        else:
            ids = _checked_ids(record[TOKENS_KEY], vocab_size=vocab_size, where=where)
        if not ids:
            raise DataError(
                f"{where}: {given[0]!r} has no tokens; the model needs at least one; repair or"
                " remove the line"
            )
        if len(ids) > most_tokens:
            raise DataError(
                f"{where}: {given[0]!r} has {len(ids)} tokens; at most {most_tokens} are possible,"
                f" {rule}; shorten or split it"
            )
        yield Line(where=where, record=record, ids=ids)


def _checked_ids(value: object, *, vocab_size: int, where: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {TOKENS_KEY!r} is a {type(value).__name__}; it must be a list of ids; repair"
            " or remove the line"
        )
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise DataError(
                f"{where}: {TOKENS_KEY!r} has {token!r} at place {index}; ids are whole numbers"
                f" from 0 to {vocab_size - 1}; repair or remove the line"
            )
    return value


class WholeFile:
    """A file that is written beside its place and takes it, in one step, when it is complete.

    A context manager; an exception inside leaves the place as it was.

    Args:
        path: its place; a file there is replaced.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        if self._path.is_dir() or not self._path.parent.is_dir():
            what = "is a directory" if self._path.is_dir() else "lies in no directory"
            raise DataError(f"output {path} {what}; name a file in a directory that exists")
        try:
            self.file: IO[bytes] = self._temporary.open("wb")
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> "WholeFile":
        return self

    def write_record(self, record: dict[str, Any]) -> None:
        """Append an object as a line."""
        try:
            text = json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate in a key that is only kept: as an escape
            text = json.dumps(record).encode("ascii")
        try:
            self.file.write(text + b"\n")
        except OSError as error:
            raise self._failure(error) from error

    def write_array(self, array: np.ndarray) -> None:
        """Write an array as a .npy file has it."""
        try:
            np.save(self.file, array, allow_pickle=False)
        except OSError as error:
            raise self._failure(error) from error

    def finish(self) -> None:
        """Force it to the disk and put it in its place."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was not finished."""
        self.file.close()
        self._temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"output {self._path} cannot be written: {error.strerror or error}; free some space or"
            " name another file"
        )
