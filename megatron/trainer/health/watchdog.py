"""Ends a run that hangs, and names the rank that blocks it.

A thread of each rank sends heartbeats to the job's store. A rank that has begun no stage for a
while reads the others'; the lowest rank that still sends them writes one message and ends its
process, so that torchrun ends the job, or starts it again. `heartbeat.find_hang` says what a hang
is.

The collectives' own timeout (--distributed-timeout-minutes) is longer: it would end the ranks that
wait, each with a traceback of its own, and name none of those they wait for.
"""

import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.trainer.health.heartbeat import (
    Hang,
    Heartbeat,
    Observation,
    TrainingThread,
    find_hang,
)
from megatron.trainer.hooks.base import Hook

if TYPE_CHECKING:
    from megatron.trainer.runtime.launch import RunContext

logger = logging.getLogger(__name__)

_SHARE_OF_TIMEOUT = 0.8
_LONGEST_INTERVAL_S = 5.0
_FIRST_OBSERVERS = 16
"""Ranks that read the others' heartbeats before the whole timeout is over. Were it all of them,
thousands of ranks would read each other's whenever a step is long."""
_WRITING_TIME_S = 5.0
_STOPPING_TIME_S = 5.0
_REPORTED = "reported"

_numbers = itertools.count()


def timeout_before(distributed_timeout_minutes: float) -> float:
    """Return seconds after which the watchdog reports before the collectives give up."""
    return _SHARE_OF_TIMEOUT * 60 * distributed_timeout_minutes


def start_watchdog(ctx: "RunContext", timeout_s: float) -> "Watchdog":
    """Watch this rank from now on; called by every rank once the process groups are there."""
    watchdog = Watchdog(
        rank=ctx.rank, world_size=ctx.world_size, timeout_s=timeout_s, device=ctx.device
    )
    watchdog.start()
    return watchdog


class Watchdog(Hook):
    """Watches the thread that starts it.

    Every rank makes one, in the same order if it makes several, and begins the same stages.

    Args:
        rank: this rank.
        world_size: ranks in the run.
        timeout_s: the run hangs when no stage has begun for so many seconds, and nothing was done
            where others wait. It is found out within a tenth of that more.
        device: of the run's tensors.
        status: exit status of a process that is ended.
        store: where heartbeats go; None means that of torch's process group. One rank alone needs
            none.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        device: torch.device | None = None,
        status: int = 1,
        store: dist.Store | None = None,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 20)
        self._device = torch.device("cpu") if device is None else device
        self._status = status
        self._store = store
        self._name = f"watchdog/{next(_numbers)}"
        self._stage = ("start", 0, 0, time.monotonic())  # name, iteration, number, when
        self._is_waiting = False
        self._resumed_at = 0.0
        self._has_left = threading.Event()
        self._threads: list[threading.Thread] = []
        self._num_heartbeats = 0
        self._reached_store_at = time.monotonic()
        self._received: dict[int, tuple[bytes, float]] = {}
        self._observing_since: float | None = None

    def start(self) -> None:
        """Begin to watch the thread that calls."""
        self._trainer = threading.current_thread()
        self._thread = TrainingThread(self._trainer, self._device)
        if self._world_size > 1:
            # A connection of its own: the training thread may be waiting on the other.
            store: Any = self._store or dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(self._name, store.clone())
            # torchrun may hand on the store of an attempt that ended so.
            self._store.delete_key(_REPORTED)
            self._threads.append(
                threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True)
            )
        self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        self._stage = ("start", 0, 0, time.monotonic())
        self._reached_store_at = time.monotonic()
        for thread in self._threads:
            thread.start()

    def on_stage(self, stage: str, iteration: int) -> None:
        """Note that this rank makes progress."""
        self._stage = (stage, iteration, self._stage[2] + 1, time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that this rank waits for others in another way than a collective."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def stop(self) -> None:
        """Stop watching this rank. May be called again."""
        self._has_left.set()
        for thread in self._threads:
            thread.join(_STOPPING_TIME_S)

    def _watch(self) -> None:
        """Send heartbeats and look for a hang until the rank leaves; then say that it has."""
        try:
            before = time.monotonic()
            while not self._has_left.wait(self._interval_s):
                before = self._note_suspension(before)
                self._send_heartbeat()
                self._check()
            self._send_heartbeat()
        except dist.DistError as error:
            # The process that serves the store has gone, and the job with it. If it has not, and
            # this rank gets no further, `_watch_store` says so.
            logger.debug("the watchdog lost the store: %s", error)

    def _note_suspension(self, before: float) -> float:
        """Take the time; note if the process was suspended since `before`, by a scheduler perhaps.

        Then even this thread, which wakes often, has not run. What was not done meanwhile is no
        hang.
        """
        now = time.monotonic()
        if now - before > self._timeout_s / 2:
            self._resumed_at = now
        return now

    def _stage_age_s(self) -> float:
        """Return seconds since the last stage began, or since a suspended process went on."""
        return time.monotonic() - max(self._stage[3], self._resumed_at)

    def _send_heartbeat(self) -> None:
        text = self._heartbeat().to_json()
        if self._store is not None:
            self._store.set(str(self._rank), text)
            self._reached_store_at = time.monotonic()
        self._received[self._rank] = (text.encode(), time.monotonic())

    def _heartbeat(self) -> Heartbeat:
        stage, iteration, num_stages, _ = self._stage
        self._num_heartbeats += 1
        idle_s, is_gpu_busy = self._thread.sample()
        stage_age_s = self._stage_age_s()
        is_in_collective, frames = False, tuple[str, ...]()
        if stage_age_s > self._timeout_s / 4:
            is_in_collective, frames = self._thread.stack()
        return Heartbeat(
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._num_heartbeats,
            stage=stage,
            iteration=iteration,
            num_stages=num_stages,
            stage_age_s=stage_age_s,
            idle_s=min(idle_s, stage_age_s),
            is_waiting=is_in_collective or is_gpu_busy or self._is_waiting,
            has_left=self._has_left.is_set(),
            frames=frames,
        )

    def _check(self) -> None:
        """Look for a hang if this rank's stage has lasted long; end the job if there is one."""
        share = 0.5 if self._rank < _FIRST_OBSERVERS else 1.0
        if self._stage_age_s() < share * self._timeout_s:
            self._observing_since = None
            return
        if self._store is not None and self._store.check([_REPORTED]):
            # Whoever reported must end first: torchrun reports the first that fails.
            time.sleep(2 * self._interval_s)
            self._exit()
        hang = find_hang(self._observe(), timeout_s=self._timeout_s)
        if hang is not None and hang.reporter == self._rank:
            self._report(hang)

    def _observe(self) -> dict[int, Observation]:
        """Read the others' heartbeats; how long they are silent is counted from the first time."""
        now = time.monotonic()
        if self._observing_since is None:
            self._observing_since = now
            self._received = {self._rank: self._received[self._rank]}
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        if self._store is not None:
            sending = [
                rank for rank in others if rank in self._received or self._store.check([str(rank)])
            ]
            heartbeats = self._store.multi_get([str(rank) for rank in sending])
            for rank, text in zip(sending, heartbeats, strict=True):
                if rank not in self._received or self._received[rank][0] != text:
                    self._received[rank] = (text, now)
        found = {
            rank: Observation(heartbeat=None, silent_s=now - self._observing_since)
            for rank in others
        }
        for rank, (text, received_at) in self._received.items():
            found[rank] = Observation(
                heartbeat=Heartbeat.from_json(text), silent_s=now - received_at
            )
        return found

    def _watch_store(self) -> None:
        """Report when this rank makes no progress and the store does not answer either."""
        thread = TrainingThread(self._trainer, self._device)
        now = time.monotonic()
        while not self._has_left.wait(self._interval_s):
            now = self._note_suspension(now)
            lost_s = now - max(self._reached_store_at, self._resumed_at)
            idle_s = min(thread.sample()[0], self._stage_age_s())
            # One after the other: with the first that ends, torchrun ends all.
            patience_s = self._timeout_s + min(self._rank, _FIRST_OBSERVERS) * self._interval_s
            if idle_s > patience_s and lost_s > self._timeout_s / 2:
                stage, iteration, *_ = self._stage
                _, frames = thread.stack()
                self._abort(
                    f"rank {self._rank} on {socket.gethostname()} has made no progress for"
                    f" {self._timeout_s:g} s, and the job's store has not answered for"
                    f" {lost_s:.0f} s: torchrun on the first node, or rank 0 where there is no"
                    " torchrun, is stopped or its node is gone. This rank is in stage"
                    f" '{stage}' of iteration {iteration}"
                    + "".join(f"\n    at {each}" for each in frames)
                )

    def _report(self, hang: Hang) -> None:
        # Two ranks may each take the other for lost: one message is enough.
        if self._store is None or self._store.add(_REPORTED, 1) == 1:
            self._abort(hang.message)

    def _abort(self, message: str) -> None:
        """Write the message and end this process, whatever its other threads do."""
        text = f"\nwatchdog: {message}\nwatchdog: rank {self._rank} ends the job, which hangs\n"

        def write() -> None:
            # Not through logging: the thread that hangs may hold its lock.
            os.write(2, text.encode())
            sys.stdout.flush()
            sys.stderr.flush()

        writer = threading.Thread(target=write, name="watchdog-writer", daemon=True)
        writer.start()
        writer.join(_WRITING_TIME_S)  # nobody may be reading
        self._exit()

    def _exit(self) -> None:
        self._has_left.set()  # the other thread need not report too
        os._exit(self._status)
