"""Locks a file against other processes; the system gives the lock back when a process ends."""

import errno
import fcntl
import time
from collections.abc import Callable
from typing import IO, Any

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""Errors of file systems without locks."""
_WAIT_S = 0.25


def wait_for_lock(
    file: IO[Any], patience_s: float, *, on_wait: Callable[[], None] | None = None
) -> None:
    """Lock an open file until it is closed.

    Args:
        file: it.
        patience_s: how long to wait for another process.
        on_wait: called once, before the first wait.

    Raises:
        BlockingIOError: another process holds it still.
        OSError: it cannot be locked; see `NO_LOCKS`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        if on_wait is not None:
            on_wait()
            on_wait = None
        time.sleep(_WAIT_S)
