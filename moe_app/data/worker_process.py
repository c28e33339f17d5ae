"""Begins worker processes that tokenize."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def begin_worker() -> None:
    """Leave interrupts to the process that started this one, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A worker is one of several: the tokenizers library is not to start as many threads again.
    os.putenv("TOKENIZERS_PARALLELISM", "false")


def _end_with_parent() -> None:
    """End this process when its parent is gone, killed for example."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
