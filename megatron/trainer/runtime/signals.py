"""Notices that the run should stop soon: SIGTERM and SIGUSR1, noted and not died of.

Imports nothing heavy, so that a program can listen before the imports that take seconds.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

NOTICES = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take the machine away."""

STARTED = time.monotonic()
"""When this process came up, give or take the interpreter's own start."""

_seen: list[signal.Signals] = []
_before: dict[signal.Signals, Any] = {}


def listen() -> None:
    """Note notices from now on; does nothing outside the main thread, or when listening already."""
    if _before or threading.current_thread() is not threading.main_thread():
        return
    for notice in NOTICES:
        _before[notice] = signal.signal(notice, _note)


def stop_listening() -> None:
    """Handle notices as before `listen`, and forget what was noted."""
    while _before:
        notice, handler = _before.popitem()
        # None: it was not set from Python.
        signal.signal(notice, signal.SIG_DFL if handler is None else handler)
    _seen.clear()


def ignore_no_more() -> None:
    """Die of notices as programs do, of one that has come already too."""
    seen = list(_seen)
    stop_listening()
    for notice in seen:
        os.kill(os.getpid(), notice)


def seen() -> signal.Signals | None:
    """The first notice that came since `listen`."""
    return _seen[0] if _seen else None


def _note(number: int, _frame: FrameType | None) -> None:
    _seen.append(signal.Signals(number))
