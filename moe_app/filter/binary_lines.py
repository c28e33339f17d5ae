"""Reads lines of plain, gzip and zstd files, bounded in memory and in what they unpack to."""

import io
from collections.abc import Iterator
from pathlib import Path

from megatron.trainer.data.text_input import UNREADABLE, check_ratio, unpack
from megatron.trainer.errors import DataError
from megatron.trainer.io.bounded_read import open_regular

MOST_LINE_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20
_MAGIC_BYTES = 4


def read_bounded_lines(
    path: str, *, most_line_bytes: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number, counted from 1; None for one that is too long to hold.

    How a file is packed is seen from its first bytes, not from its name.

    Args:
        path: The file.
        most_line_bytes: Of a line; None means `MOST_LINE_BYTES`.

    Raises:
        DataError: The file is damaged, or unpacks to far more than text does.
        OSError: It cannot be read.
    """
    most = most_line_bytes or MOST_LINE_BYTES
    with open(open_regular(Path(path)), "rb") as packed:
        size = packed.seek(0, io.SEEK_END)
        packed.seek(0)
        number = unpacked = 0
        try:
            start = packed.read(_MAGIC_BYTES)
            packed.seek(0)
            file = unpack(start, packed)
            while line := file.readline(most + 1):
                number += 1
                is_too_long = len(line) > most
                unpacked += len(line)
                while is_too_long and not line.endswith(b"\n"):
                    if not (line := file.readline(_BLOCK_BYTES)):
                        break
                    unpacked += len(line)
                    check_ratio(path, unpacked, size)
                check_ratio(path, unpacked, size)
                yield number, None if is_too_long else line
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{path}, after line {number}: cannot be unpacked ({error}); a packed file must be"
                " whole; fetch it again"
            ) from error
