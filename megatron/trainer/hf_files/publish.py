"""Publishes a directory under its name only when it is complete."""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.atomic_write import sync_directory

logger = logging.getLogger(__name__)


def check_new(path: Path) -> None:
    """Refuse an existing path.

    Raises:
        CheckpointError: it exists, be it a link that leads nowhere.
    """
    if os.path.lexists(path):
        raise CheckpointError(
            f"{path} exists; nothing is written over: remove it, or give another directory"
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; it is renamed to `path` when the block succeeds.

    When the block fails or is interrupted, the temporary directory is removed. A killed process
    leaves one behind, `NAME.tmp-ID`; the next call for the same path removes it, unless the process
    that fills it is alive: it holds a lock on it.

    Args:
        path: must not exist; its parent is made.

    Raises:
        CheckpointError: it exists.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    partial = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        sync_directory(partial)
        check_new(path)
        partial.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of earlier attempts to write `path`."""
    name = re.compile(re.escape(path.name) + r"\.tmp-[0-9a-f]{8}")
    for entry in path.parent.iterdir():
        if not name.fullmatch(entry.name) or not entry.is_dir() or entry.is_symlink():
            continue
        lock = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s is being written by another process; it is left alone", entry)
            continue
        finally:
            os.close(lock)
        logger.warning("removing %s: the process that wrote it did not finish", entry)
        shutil.rmtree(entry)
