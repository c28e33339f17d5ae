"""Reads texts from JSON Lines files, one object a line."""

import codecs
import json
import logging
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron.trainer.data.text_input import UNREADABLE, TextInput
from megatron.trainer.errors import DataError

MOST_LINE_BYTES = 1 << 28
"""Of one line; a longer one is no document."""
_SHOWN_KEYS = 20


class TextLines:
    """Iterates over the lines of an input that are not blank, with their numbers in the file.

    Args:
        path: A file, a pipe, or `-` for standard input; gzip and zstd are decompressed.
        is_reread: Whether it will be iterated over several times.
    """

    def __init__(self, path: str, *, is_reread: bool = False) -> None:
        self._input = TextInput(path, is_reread=is_reread)
        self.name: str = self._input.name
        """The input, for messages."""
        self.num_blank = 0
        """Lines without text that the latest iteration has passed."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line with its number, counted from 1.

        Raises:
            DataError: The input cannot be read to its end, is in another encoding, or a line is
                longer than memory should have to hold.
        """
        self.num_blank = 0
        number = 1
        with self._input.open() as file:
            while line := self._read(file, number):
                if number == 1:
                    line = without_mark(line, path=self.name)
                if number == self.num_blank + 1:
                    refuse_array(line, path=self.name, number=number)
                self._refuse_long(line, number)
                if line.strip():
                    yield number, line
                else:
                    self.num_blank += 1
                number += 1

    def log_blank(self, logger: logging.Logger) -> None:
        """Log how many lines without text the latest iteration has passed, if any."""
        if self.num_blank:
            logger.info("%s: %d blank lines skipped", self.name, self.num_blank)

    def _read(self, file: BinaryIO, number: int) -> bytes:
        where = f"{self.name}, line {number}"
        try:
            line = file.readline(MOST_LINE_BYTES + 1)
        except UNREADABLE as error:
            raise DataError(
                f"{where}: cannot be read ({error or type(error).__name__}); the data are damaged"
                " or cut off; restore the input"
            ) from error
        return line

    def _refuse_long(self, line: bytes, number: int) -> None:
        if len(line) > MOST_LINE_BYTES:
            raise DataError(f"{self.name}, line {number}{too_long()}")


def too_long() -> str:
    """Return what is wrong with a line that is too long, to put after its place."""
    return (
        f": has more than {MOST_LINE_BYTES:,} bytes; each line must be one JSON object of at most"
        " that size; split the document, or write one object a line"
    )


def refuse_array(line: bytes, *, path: str, number: int) -> None:
    """Refuse a file that is one JSON array, as its first line that is not blank shows.

    Raises:
        DataError: It is.
    """
    if line.lstrip().startswith(b"["):
        raise DataError(
            f"{path}, line {number}: begins a JSON array; each line must be one JSON"
            " object; convert the file with jq -c '.[]'"
        )


def without_mark(line: bytes, *, path: str) -> bytes:
    """Return a file's first line without the byte order mark of UTF-8.

    Raises:
        DataError: It is in another encoding.
    """
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:4]:
        raise DataError(
            f"{path} is in UTF-16 or UTF-32, as its first bytes {line[:4].hex(' ')} show;"
            " an input must be JSON Lines in UTF-8; convert it with iconv -t UTF-8"
        )
    return line.removeprefix(codecs.BOM_UTF8)


def parse_text(line: bytes, *, key: str, path: str, number: int) -> str:
    """Return the text that one line holds under a key.

    Args:
        line: One JSON object in UTF-8.
        key: Where in the object the text is.
        path: The file, for messages.
        number: The line's number, for messages.

    Raises:
        DataError: The line is not a JSON object, lacks the key, or holds no valid text there.
    """
    value = parse_object(line, path=path, number=number)
    return text_under(key, value, where=f"{path}, line {number}", flag="--json-keys")


def text_under(key: str, value: dict[str, Any], *, where: str, flag: str) -> str:
    """Return the text that an object holds under a key.

    Args:
        key: Where in the object the text is.
        value: The object.
        where: The file and line, for messages.
        flag: What names the key.

    Raises:
        DataError: The object lacks the key, or holds no valid text there.
    """
    if key not in value:
        raise DataError(
            f"{where}: no key {key!r} among {sorted(value)[:_SHOWN_KEYS]}; each object must have"
            f" it; name the right key with {flag}"
        )
    return valid_text(value, key, where=where)


def parse_object(line: bytes, *, path: str, number: int) -> dict[str, Any]:
    """Return the JSON object that one line holds.

    Args:
        line: One JSON object in UTF-8.
        path: The file, for messages.
        number: The line's number, for messages.

    Raises:
        DataError: The line is not a JSON object.
    """
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}); each line must be one JSON object in UTF-8;"
            f" {_remedy(line)}"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: a JSON {type(value).__name__}; each line must be one JSON object; repair or"
            " remove the line"
        )
    return value


def valid_text(value: dict[str, Any], key: str, *, where: str) -> str:
    """Return the text under a key that is there.

    Args:
        value: A line's object.
        key: Where in the object the text is.
        where: The file and line, for messages.

    Raises:
        DataError: It is not a string, or not valid Unicode.
    """
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {key!r} is a {type(text).__name__}; it must be a string; repair or remove"
            " the line"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} has a lone surrogate at character {error.start}; text must be valid"
            " Unicode; repair or remove the line"
        ) from error
    return text


def read_texts(lines: TextLines, *, key: str) -> Iterator[str]:
    """Yield the text of each line.

    Raises:
        DataError: As iterating over `lines`, and `parse_text`.
    """
    for number, line in lines:
        yield parse_text(line, key=key, path=lines.name, number=number)


def _remedy(line: bytes) -> str:
    if line.strip() == b"{":
        return "this object spans several lines; convert the file with jq -c ."
    return "repair or remove the line"
