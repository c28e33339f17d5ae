"""Tunes how the C library treats freed memory."""

import ctypes
import sys

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, in this process.

    By itself it gives every block of some megabytes back to the system, and gets fresh pages for
    the next one, which the system clears first: a training step on a CPU spent a quarter of its
    time there (docs/log.md). After its peak the process does not shrink. Work that repeats the
    same sizes, as steps do, fits into what it has; sizes that grow and differ leave gaps, and took
    up to a fifth more memory in a trial. Where the library has no such setting, nothing is changed
    but the speed.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
