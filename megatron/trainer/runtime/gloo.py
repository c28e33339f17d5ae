"""Lets the process groups of a CPU run share gloo's thread for connections."""

import functools
from typing import Any

from torch import distributed as dist

_state = {"is_shared": False}


def share_connections() -> None:
    """Start the gloo groups of this process on the device of the first, from now on.

    A device is a thread that looks after sockets and wakes a hundred times a second. torch gives
    one to each group, and megatron-core starts thirty groups or more. Calling this again changes
    nothing.
    """
    if not _state["is_shared"]:
        _state["is_shared"] = True
        group: Any = dist.ProcessGroupGloo
        group.__init__ = _sharing(group)


def _sharing(group: Any) -> Any:
    """Return the `__init__` of a group that has devices of its own only the first time."""
    start = group.__init__
    devices: list[Any] = []

    @functools.wraps(start)
    def start_sharing(self: Any, *arguments: Any, timeout: Any = None) -> None:
        if timeout is None:  # with options or the usual timeout, which this run does not use
            start(self, *arguments)
        elif not devices:
            # torch knows which interfaces these listen on.
            start(self, *arguments, timeout=timeout)
            devices.extend(self.options._devices)
        else:
            options = group._Options()
            options._devices = devices
            options._threads = 2 * len(devices)  # torch's number
            options._timeout = timeout
            start(self, *arguments, options)

    return start_sharing
