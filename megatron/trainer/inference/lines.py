"""Read texts or tokens from JSON Lines, and write files that appear only when complete."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron.trainer.data.jsonl import TextLines, parse_object, valid_text
from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import AtomicFile

TOKENS_KEY = "tokens"


@dataclass(frozen=True, kw_only=True)
class Line:
    """Holds one line of an input."""

    where: str
    """File and line, for messages."""
    record: dict[str, Any]
    """The parsed object."""
    ids: list[int]
    """Tokens, at least one."""


def read_tokens(
    lines: TextLines,
    *,
    text_key: str,
    encode: Callable[[str], list[int]],
    vocab_size: int,
    max_tokens: int,
    rule: str,
    written_keys: Collection[str],
    others: Mapping[str, Callable[[dict[str, Any], str], list[int]]] | None = None,
) -> Iterator[Line]:
    """Yield each line of an input as tokens; blank ones are passed over.

    Args:
        lines: JSON Lines; each object has either a text or, under "tokens", a list of ids. Its
            other keys may be anything.
        text_key: key of the text.
        encode: turns a text into ids.
        vocab_size: exclusive upper bound of ids.
        max_tokens: longest line allowed.
        rule: why there is a limit, for the message.
        written_keys: keys that will be added to the object, which it must not have.
        others: more keys, one of which an object may have instead; each with what makes tokens of
            the object, given also where it is for messages.

    Raises:
        DataError: the input cannot be read or a line is invalid; names the line.
    """
    encoders: dict[str, Callable[[dict[str, Any], str], list[int]]] = {
        text_key: lambda record, where: encode(valid_text(record, text_key, where=where)),
        TOKENS_KEY: lambda record, where: _checked_ids(
            record[TOKENS_KEY], vocab_size=vocab_size, where=where
        ),
        **(others or {}),
    }
    for number, line in lines:
        where = f"{lines.name}, line {number}"
        record = parse_object(line, path=lines.name, number=number)
        taken = sorted(record.keys() & set(written_keys))
        if taken:
            raise DataError(
                f"{where}: has the key {taken[0]!r}, which the output adds; keys are not"
                " overwritten; remove or rename it"
            )
        given = [key for key in encoders if key in record]
        if len(given) != 1:
            raise DataError(
                f"{where}: has {' and '.join(repr(key) for key in given) or 'neither key'}; each"
                f" object needs one of {_named(text_key, others)}; repair or remove the line"
            )
        ids = encoders[given[0]](record, where)
        if not ids:
            raise DataError(
                f"{where}: {given[0]!r} has no tokens; the model needs at least one; repair or"
                " remove the line"
            )
        if len(ids) > max_tokens:
            raise DataError(
                f"{where}: {given[0]!r} has {len(ids)} tokens; at most {max_tokens} are allowed,"
                f" {rule}; shorten or split it"
            )
        yield Line(where=where, record=record, ids=ids)


def _named(text_key: str, others: Collection[str] | None) -> str:
    """Return the keys of which an object needs one, for a message."""
    first = ", ".join([f"{text_key!r} (text)", *map(repr, others or ())])
    return f"{first} and {TOKENS_KEY!r} (ids)"


def _checked_ids(value: object, *, vocab_size: int, where: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {TOKENS_KEY!r} is a {type(value).__name__}; it must be a list of ids; repair"
            " or remove the line"
        )
    for index, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise DataError(
                f"{where}: {TOKENS_KEY!r} has {token!r} at index {index}; ids are integers"
                f" from 0 to {vocab_size - 1}; repair or remove the line"
            )
    return value


class OutputFile:
    """Writes records or arrays to a file that appears under its name when it is complete.

    A context manager; an exception inside leaves `path` as it was.

    Args:
        path: final path; a file there is replaced.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if self._path.is_dir() or not self._path.parent.is_dir():
            what = "is a directory" if self._path.is_dir() else "is in no existing directory"
            raise DataError(f"output {path} {what}; name a file in a directory that exists")
        try:
            self._pending = AtomicFile(self._path, durable=True)
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> "OutputFile":
        return self

    def write_record(self, record: dict[str, Any]) -> None:
        """Append an object as a line."""
        try:
            text = json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate in another key: write it escaped
            text = json.dumps(record).encode("ascii")
        try:
            self._pending.file.write(text + b"\n")
        except OSError as error:
            raise self._failure(error) from error

    def write_array(self, array: np.ndarray) -> None:
        """Write an array in .npy format."""
        try:
            np.save(self._pending.file, array, allow_pickle=False)
        except OSError as error:
            raise self._failure(error) from error

    def finish(self) -> None:
        """Sync the file to disk and rename it to its final path."""
        try:
            self._pending.commit()
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove an unfinished file."""
        self._pending.discard()

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"output {self._path} cannot be written: {error.strerror or error}; free some space or"
            " name another file"
        )
