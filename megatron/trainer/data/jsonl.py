"""Reads texts from JSON Lines files, one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.trainer.errors import DataError

_MOST_LINE_BYTES = 1 << 28


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield each line of a file with its number, counted from 1.

    Raises:
        DataError: The file is missing or not a file, or a line is longer than memory should have to
            hold.
    """
    if not Path(path).is_file():
        raise DataError(
            f"{path} does not exist or is not a file; an input must be a JSON Lines file; check"
            " the path"
        )
    with open(path, "rb") as file:
        number = 1
        while line := file.readline(_MOST_LINE_BYTES + 1):
            if len(line) > _MOST_LINE_BYTES:
                raise DataError(
                    f"{path}, line {number}: has more than {_MOST_LINE_BYTES:,} bytes; each line"
                    " must be one JSON object of at most that size; split the document, or write"
                    " one object a line"
                )
            yield number, line
            number += 1


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
    where = f"{path}, line {number}"
    if key not in value:
        raise DataError(
            f"{where}: no key {key!r} among {sorted(value)}; each object must have it; name the"
            " right key with --json-keys"
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
            f"{where}: not JSON ({error}); each line must be one JSON object in UTF-8; repair or"
            " remove the line"
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


def read_texts(path: str, *, key: str) -> Iterator[str]:
    """Yield the text of each line.

    Raises:
        DataError: As `read_lines` and `parse_text`.
    """
    for number, line in read_lines(path):
        yield parse_text(line, key=key, path=path, number=number)
