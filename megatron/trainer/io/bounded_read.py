"""Reads small files from untrusted sources: regular files of bounded size.

Every problem is an OSError, as of any file that cannot be read; its `strerror` says what it is.
"""

import errno
import os
import stat
from pathlib import Path, PurePath
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20


def is_plain_name(name: str) -> bool:
    """Return whether `name` is an entry of a directory and cannot lead out of it."""
    return name not in {"", ".", ".."} and PurePath(name).name == name and "\0" not in name


def target_outside(path: Path) -> Path | None:
    """Return where a link leads that leaves its directory; None for any other entry.

    The blobs of a Hugging Face Hub cache, to which its snapshots link, do not count as outside.
    """
    target, home = Path(os.path.realpath(path)), path.parent.resolve()
    is_inside = home in target.parents or home.parent.parent / "blobs" in target.parents
    return None if is_inside else target


def open_regular(path: Path) -> int:
    """Open a regular file, or a link to one, without waiting for a writer; return its descriptor.

    Raises:
        OSError: it is not there, or is something else: reading a pipe might never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def read_small(path: Path, *, most_bytes: int) -> bytes:
    """Contents of a regular file.

    Raises:
        OSError: it cannot be read, is not regular, or has more than `most_bytes`.
    """
    with open(open_regular(path), "rb") as file:
        return read_at_most(file, most_bytes)


def read_at_most(file: BinaryIO, most_bytes: int) -> bytes:
    """Read the rest of an open file; memory grows with its content, not with the limit.

    Raises:
        OSError: it cannot be read, or has more than `most_bytes`.
    """
    found = bytearray()
    while block := file.read(min(_BLOCK_BYTES, most_bytes + 1 - len(found))):
        found += block
        if len(found) > most_bytes:
            raise OSError(
                errno.EFBIG, f"it has more than {most_bytes:,} bytes, which no such file needs"
            )
    return bytes(found)
