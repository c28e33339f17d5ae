"""Records SIGTERM and SIGUSR1, which ask the run to stop soon, instead of ending the process.

Imports nothing heavy, so that a program can listen before imports that take seconds.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that schedulers send before they reclaim the machine."""

STARTED = time.monotonic()
"""Time when this process started, on the monotonic clock, seconds."""

_received: list[signal.Signals] = []
_before: dict[signal.Signals, Any] = {}


def listen() -> None:
    """Record signals from now on; do nothing outside the main thread or when listening already."""
    if _before or threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        _before[number] = signal.signal(number, _record)


def stop_listening() -> None:
    """Restore the handlers from before `listen`, and forget recorded signals."""
    while _before:
        number, handler = _before.popitem()
        # None: it was not set from Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _received.clear()


def stop_deferring() -> None:
    """Restore the default handling, and raise again what was recorded."""
    pending = list(_received)
    stop_listening()
    for number in pending:
        os.kill(os.getpid(), number)


def received() -> signal.Signals | None:
    """Return the first signal since `listen`, or None."""
    return _received[0] if _received else None


def _record(number: int, _frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
