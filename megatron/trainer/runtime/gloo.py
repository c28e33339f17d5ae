"""Lets the process groups of a CPU run share gloo's thread for connections."""

from typing import Any

import torch
from torch import distributed as dist

_group: Any = dist.ProcessGroupGloo
_start = _group.__init__


def share_connections() -> None:
    """Start the gloo groups of this process on the device of the world's group, from now on.

    A device is a thread that looks after sockets and wakes a hundred times a second. torch gives
    one to each group, and megatron-core starts thirty groups or more. Calling this again changes
    nothing.
    """
    _group.__init__ = _start_sharing


def _start_sharing(
    self: Any, store: Any, rank: int, size: int, *others: Any, timeout: Any = None
) -> None:
    """Start a group that has devices of its own only where there is no world."""
    if timeout is None:  # with options, a timeout by position, or the usual one
        _start(self, store, rank, size, *others)
    elif devices := _devices_of_world():
        options = _group._Options()
        options._devices = devices
        options._threads = 2 * len(devices)  # torch's number
        options._timeout = timeout
        _start(self, store, rank, size, options)
    else:
        _start(self, store, rank, size, timeout=timeout)


def _devices_of_world() -> list[Any]:
    """Return what the group of all ranks listens with; nothing where that is not gloo's."""
    cpu = torch.device("cpu")
    world = dist.group.WORLD
    if world is None or cpu not in world._device_types:
        return []
    backend = world._get_backend(cpu)
    if not isinstance(backend, dist.ProcessGroupGloo):
        return []
    options: Any = backend.options
    return list(options._devices)
