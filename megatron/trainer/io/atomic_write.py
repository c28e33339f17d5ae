"""Writes a file so that a reader sees its old content or its new one, never a part of it.

The content goes to a temporary file beside the target, which then takes the target's name in one
step. A symbolic link under that name is replaced, not followed.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO


class AtomicFile:
    """Holds a file that is being written under a temporary name.

    The permissions of a file that it replaces are kept; a new file gets those of the umask.

    Args:
        path: the target; a file there is replaced by `commit`.
        durable: force content and name to disk, so that they outlive a power failure.

    Raises:
        OSError: the temporary file cannot be created.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        self._durable = durable
        self._temporary = temporary_path(path)
        # Left by an earlier process of this id, or a link: `x` never writes through it.
        self._temporary.unlink(missing_ok=True)
        self.file: BinaryIO = self._temporary.open("xb")

    def commit(self) -> None:
        """Give the file its name.

        Raises:
            OSError: something cannot be written; call `discard` then.
        """
        if (mode := _mode(self.path)) is not None:
            os.fchmod(self.file.fileno(), mode)
        if self._durable:
            sync_file(self.file)
        self.file.close()
        os.replace(self._temporary, self.path)
        if self._durable:
            sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with contextlib.suppress(OSError):  # what is buffered may not fit on a full disk
            self.file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write; it takes the name `path` when the block ends well.

    When the block raises, the target stays as it was and nothing is left beside it.

    Args:
        path: the target.
        durable: force content and name to disk.

    Raises:
        OSError: it cannot be written.
    """
    pending = AtomicFile(path, durable=durable)
    try:
        yield pending.file
        pending.commit()
    except BaseException:
        pending.discard()
        raise


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace `path` by a file with this content; see `atomic_write`."""
    with atomic_write(path, durable=durable) as file:
        file.write(content)


def write_text(path: Path, text: str, *, durable: bool = False, errors: str = "strict") -> None:
    """Replace `path` by a file with this text as UTF-8; see `atomic_write`."""
    write_bytes(path, text.encode("utf-8", errors=errors), durable=durable)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file straight to its name and force it to disk.

    For a directory that is itself still under a temporary name; `write_text` replaces files that
    may be read meanwhile.
    """
    with path.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        sync_file(file)


def temporary_path(path: Path) -> Path:
    """Return where this process writes what will be `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def sync_file(file: IO[bytes]) -> None:
    """Force what was written to `file` to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Force the names in `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int | None:
    """Return the permission bits of a regular file; None where there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None
