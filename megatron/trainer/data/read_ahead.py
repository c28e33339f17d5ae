"""Takes the items of an iterator in a thread, before they are asked for."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

THREAD_NAME = "read-ahead"
"""What the names of reading threads begin with."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Says how batches get from files to the step."""

    num_ahead: int = 0
    """Global batches that a thread reads before they are asked for; 0 reads each when asked."""
    gpu: torch.device | None = None
    """Where batches will be copied to, from page-locked memory; None is plain memory."""

    @property
    def pin_memory(self) -> bool:
        """Return whether batches are read into page-locked memory."""
        return self.gpu is not None


class ReadAhead(Generic[T]):
    """Iterates over items that a thread takes from another iterator, in the same order.

    What the iterator raises is raised where its item is asked for. The thread ends with `close`,
    and with the object.

    Args:
        items: Iterated over by the thread alone from now on, beginning at once.
        loading: How many items are taken before they are asked for; with 0 there is no thread.
    """

    def __init__(self, items: Iterator[T], loading: Loading) -> None:
        self._items = items
        self._process = os.getpid()
        self._pending: deque[Future[T]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        if loading.num_ahead:
            self._executor = ThreadPoolExecutor(
                1, THREAD_NAME, initializer=_choose_gpu, initargs=(loading.gpu,)
            )
            for _ in range(loading.num_ahead):
                self._submit(self._executor)

    @property
    def is_usable(self) -> bool:
        """Return whether the thread exists in this process: a fork does not take it along."""
        return self._executor is None or os.getpid() == self._process

    def __iter__(self) -> "ReadAhead[T]":
        """Return the object itself."""
        return self

    def __next__(self) -> T:
        """Return the next item; wait for it if it is not ready."""
        if self._executor is None:
            return next(self._items)
        self._submit(self._executor)
        return self._pending.popleft().result()

    def close(self) -> None:
        """Let the thread end after the item it is at; drop what is ready."""
        if self._executor is not None and self.is_usable:
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    def _submit(self, executor: ThreadPoolExecutor) -> None:
        self._pending.append(executor.submit(next, self._items))


def _choose_gpu(gpu: torch.device | None) -> None:
    """Make a GPU the thread's own: threads begin on the first, and would start a context there."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
