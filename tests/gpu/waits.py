"""Finds operations in which the host waits for the GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Makes it an error to wait for the GPU within the context."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # What torch says, once a process, where the mode is switched on: it does not find all.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
