"""Lets the process groups of a CPU run share gloo's thread for connections."""

import functools
from typing import Any

import torch
from torch import distributed as dist

_state = {"is_shared": False}


def share_connections() -> None:
    """Start the gloo groups of this process on the device of the world's group, from now on.

    A device is a thread that looks after sockets and wakes a hundred times a second. torch gives
    one to each group, and megatron-core starts thirty groups or more. Calling this again changes
    nothing.
    """
    if not _state["is_shared"]:
        _state["is_shared"] = True
        group: Any = dist.ProcessGroupGloo
        group.__init__ = _sharing(group)


def _sharing(group: Any) -> Any:
    """Return the `__init__` of a group that has devices of its own only where there is no world."""
    start = group.__init__

    @functools.wraps(start)
    def start_sharing(
        self: Any, store: Any, rank: int, size: int, *others: Any, timeout: Any = None
    ) -> None:
        devices = _devices_of_world()
        if timeout is None:  # with options, a timeout by position, or the usual one
            start(self, store, rank, size, *others)
        elif not devices:
            start(self, store, rank, size, timeout=timeout)
        else:
            options = group._Options()
            options._devices = devices
            options._threads = 2 * len(devices)  # torch's number
            options._timeout = timeout
            start(self, store, rank, size, options)

    return start_sharing


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
