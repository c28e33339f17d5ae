"""Writes checkpoints in a thread, while training goes on.

A save stops training for the checks and a copy of the state to host memory. The thread of each rank
then writes, hashes and publishes as a save in the foreground does, over a process group of its own,
so that a kill at any moment leaves what it would leave there.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.trainer.checkpoint.save import (
    ShardedStateDict,
    StagedCheckpoint,
    check_retention,
    saving,
    stage_checkpoint,
    write_checkpoint,
)

T = TypeVar("T")

THREAD_NAME = "checkpoint-writer"
"""Names the thread that writes."""


@dataclass(frozen=True, kw_only=True)
class FinishedSave:
    """Describes a checkpoint that is complete."""

    iteration: int
    """Optimizer steps it holds."""
    path: Path
    """Directory of the checkpoint."""
    seconds: float
    """From the begin of the save until it was complete."""
    blocked_seconds: float
    """Seconds of these in which training stood still."""


class BackgroundSaver:
    """Saves one checkpoint at a time in a thread of this rank.

    Every rank makes one, at the same point, and calls its methods in the same order.

    Args:
        device: of this rank's tensors, for the all-reduce of `poll`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # All ranks. gloo, because the thread's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo")
        self._pending: _Pending | None = None

    @property
    def is_saving(self) -> bool:
        """Return whether a save has begun that `wait` has not returned; alike on all ranks."""
        return self._pending is not None

    def save(
        self,
        root: Path,
        iteration: int,
        state: ShardedStateDict,
        *,
        files: Mapping[str, str | bytes | Path] | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        """Copy `state` and begin to write it; arguments as `save_checkpoint`'s.

        Raises:
            ConfigError: as `save_checkpoint`.
            CheckpointError: the state is invalid on some rank; raised on all.
            RuntimeError: another save has not been waited for.
        """
        if self._pending is not None:
            raise RuntimeError(f"iteration {self._pending.iteration} is still being saved")
        began = time.perf_counter()
        check_retention(keep_last, keep_every)
        with saving(root, iteration):
            staged = stage_checkpoint(state, files=files, is_copied=True)
        write = partial(
            self._write, root, iteration, staged, keep_last=keep_last, keep_every=keep_every
        )
        self._pending = _Pending(
            iteration=iteration,
            began=began,
            blocked_seconds=time.perf_counter() - began,
            result=_in_thread(write),
        )

    def _write(
        self,
        root: Path,
        iteration: int,
        staged: StagedCheckpoint,
        *,
        keep_last: int | None,
        keep_every: int | None,
    ) -> tuple[Path, float]:
        """Write, in the thread; return the checkpoint's directory and when it was complete."""
        with saving(root, iteration):
            path = write_checkpoint(
                root,
                iteration,
                staged,
                keep_last=keep_last,
                keep_every=keep_every,
                group=self._group,
            )
        return path, time.perf_counter()

    def poll(self) -> bool:
        """Return whether the save that has begun is over on every rank; a collective call."""
        if self._pending is None:
            return False
        is_over = torch.tensor([int(self._pending.result.done())], device=self._device)
        dist.all_reduce(is_over, op=dist.ReduceOp.MIN)
        return bool(is_over.item())

    def wait(self) -> FinishedSave:
        """Wait for the save that has begun, and forget it.

        Raises:
            CheckpointError: it failed on some rank; raised on all.
            RuntimeError: none has begun.
        """
        if self._pending is None:
            raise RuntimeError("no save has begun")
        pending, self._pending = self._pending, None
        path, ended = pending.result.result()
        return FinishedSave(
            iteration=pending.iteration,
            path=path,
            seconds=ended - pending.began,
            blocked_seconds=pending.blocked_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """Holds a save that has begun."""

    iteration: int
    began: float
    """`time.perf_counter` when it began."""
    blocked_seconds: float
    result: "Future[tuple[Path, float]]"
    """Resolves to the directory, and to `time.perf_counter` when it was complete."""


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a daemon thread: a program that ends with an error does not wait for it."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    return result
