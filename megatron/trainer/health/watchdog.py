"""Ends a run that hangs, and says which rank keeps it.

A thread of each rank tells the others through the job's store how far the rank has come. When a
rank has not moved for a while it looks at what the others say; the lowest rank that still speaks
writes one message and ends its process, so that torchrun ends the job, or starts it again. What a
hang is, `hangs.find_hang` says.

The collectives' own timeout (--distributed-timeout-minutes) comes after it: it would end the ranks
that wait, each with a traceback of its own, and name none of those they wait for.
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

from megatron.trainer.health.heartbeat import Beat, Hang, Sighting, TrainingThread, find_hang

if TYPE_CHECKING:
    from megatron.trainer.runtime.launch import RunContext

logger = logging.getLogger(__name__)

_SHARE_OF_TIMEOUT = 0.8
_LONGEST_INTERVAL_S = 5.0
_FIRST_OBSERVERS = 16
"""Ranks that look at the others before they have stood still for the whole time. Were it all of
them, thousands of ranks would read each other's words whenever a step is long."""
_WRITING_TIME_S = 5.0
_STOPPING_TIME_S = 5.0
_SPOKEN = "spoken"

_numbers = itertools.count()


def timeout_before(distributed_timeout_minutes: float) -> float:
    """Seconds of standstill that let the watchdog speak before the collectives give up."""
    return _SHARE_OF_TIMEOUT * 60 * distributed_timeout_minutes


def start_watchdog(ctx: "RunContext", timeout_s: float) -> "Watchdog":
    """Watch this rank from now on; called by every rank, once the process groups are there."""
    watchdog = Watchdog(
        rank=ctx.rank, world_size=ctx.world_size, timeout_s=timeout_s, device=ctx.device
    )
    watchdog.start()
    return watchdog


class Watchdog:
    """Watches the thread that starts it.

    Every rank makes one, in the same order if it makes several, and makes the same marks.

    Args:
        rank: this rank.
        world_size: ranks in the run.
        timeout_s: seconds without a mark, and without anything done where others wait, after which
            the run is taken for hung. It is found out within a tenth of that more.
        device: where the run's tensors live.
        status: exit status of a process that is ended.
        store: where ranks meet; None means the one that torch's process group has used. One rank
            alone needs none.
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
        self._mark = ("start", 0, 0, time.monotonic())  # stage, iteration, marks, when
        self._is_waiting = False
        self._woke_at = 0.0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._beats = 0
        self._reached_store_at = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looking_since: float | None = None

    def start(self) -> None:
        """Begin to watch the thread that calls."""
        self._trainer = threading.current_thread()
        self._thread = TrainingThread(self._trainer, self._device)
        if self._world_size > 1:
            # A connection of its own: the training thread may be waiting on the other.
            store: Any = self._store or dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(self._name, store.clone())
            # torchrun may hand on the store of an attempt that ended so.
            self._store.delete_key(_SPOKEN)
            self._threads.append(
                threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True)
            )
        self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        self._mark = ("start", 0, 0, time.monotonic())
        self._reached_store_at = time.monotonic()
        for thread in self._threads:
            thread.start()

    def mark(self, stage: str, iteration: int) -> None:
        """Say that this rank makes progress: it begins `stage` of step `iteration`."""
        self._mark = (stage, iteration, self._mark[2] + 1, time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While it lasts, this rank waits for others in a way of its own, not a collective."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def stop(self) -> None:
        """Leave: from here on this rank is not watched. May be called again."""
        self._over.set()
        for thread in self._threads:
            thread.join(_STOPPING_TIME_S)

    def _watch(self) -> None:
        """Beat and look, until the rank leaves; then say that it has."""
        try:
            before = time.monotonic()
            while not self._over.wait(self._interval_s):
                before = self._note_sleep(before)
                self._beat()
                self._look()
            self._beat()
        except dist.DistError as error:
            # The process that serves the store has gone, and the job with it. If it has not, and
            # this rank gets no further, `_watch_store` says so.
            logger.debug("the watchdog lost the store: %s", error)

    def _note_sleep(self, before: float) -> float:
        """Now; and if a thread that wakes often has not for long, the whole process was stopped.

        So it is when a scheduler suspends the job: what was not done meanwhile is no hang.
        """
        now = time.monotonic()
        if now - before > self._timeout_s / 2:
            self._woke_at = now
        return now

    def _stuck_s(self) -> float:
        """Seconds since the last mark, or since the process went on after it was stopped."""
        return time.monotonic() - max(self._mark[3], self._woke_at)

    def _beat(self) -> None:
        beat = self._own_beat()
        if self._store is not None:
            self._store.set(str(self._rank), beat.to_json())
            self._reached_store_at = time.monotonic()
        self._seen[self._rank] = (beat.to_json().encode(), time.monotonic())

    def _own_beat(self) -> Beat:
        stage, iteration, marks, _ = self._mark
        self._beats += 1
        still_s, is_gpu_busy = self._thread.look()
        mark_age_s = self._stuck_s()
        is_in_collective, where = False, tuple[str, ...]()
        if mark_age_s > self._timeout_s / 4:
            is_in_collective, where = self._thread.stack()
        return Beat(
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._beats,
            stage=stage,
            iteration=iteration,
            marks=marks,
            mark_age_s=mark_age_s,
            still_s=min(still_s, mark_age_s),
            is_waiting=is_in_collective or is_gpu_busy or self._is_waiting,
            is_over=self._over.is_set(),
            where=where,
        )

    def _look(self) -> None:
        """Look at the others if this rank has long stood still, and end it with all of them."""
        share = 0.5 if self._rank < _FIRST_OBSERVERS else 1.0
        if self._stuck_s() < share * self._timeout_s:
            self._looking_since = None
            return
        if self._store is not None and self._store.check([_SPOKEN]):
            # Whoever spoke must end first: torchrun reports the first that fails.
            time.sleep(2 * self._interval_s)
            self._exit()
        hang = find_hang(self._sightings(), timeout_s=self._timeout_s)
        if hang is not None and hang.speaker == self._rank:
            self._speak(hang)

    def _sightings(self) -> dict[int, Sighting]:
        now = time.monotonic()
        if self._looking_since is None:
            self._looking_since = now
            self._seen = {self._rank: self._seen[self._rank]}
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        if self._store is not None:
            heard = [
                rank for rank in others if rank in self._seen or self._store.check([str(rank)])
            ]
            beats = self._store.multi_get([str(rank) for rank in heard])
            for rank, beat in zip(heard, beats, strict=True):
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
        found = {rank: Sighting(beat=None, silent_s=now - self._looking_since) for rank in others}
        for rank, (beat, seen_at) in self._seen.items():
            found[rank] = Sighting(beat=Beat.from_json(beat), silent_s=now - seen_at)
        return found

    def _watch_store(self) -> None:
        """Speak when this rank is stuck and the store is too: then nobody can compare notes."""
        thread = TrainingThread(self._trainer, self._device)
        now = time.monotonic()
        while not self._over.wait(self._interval_s):
            now = self._note_sleep(now)
            lost_s = now - max(self._reached_store_at, self._woke_at)
            stuck_s = min(thread.look()[0], self._stuck_s())
            # One after the other: with the first that ends, torchrun ends all.
            patience_s = self._timeout_s + min(self._rank, _FIRST_OBSERVERS) * self._interval_s
            if stuck_s > patience_s and lost_s > self._timeout_s / 2:
                stage, iteration, *_ = self._mark
                _, where = thread.stack()
                self._end(
                    f"rank {self._rank} on {socket.gethostname()} has got no further for"
                    f" {self._timeout_s:g} s, and the job's store has not answered for"
                    f" {lost_s:.0f} s: torchrun on the first node, or rank 0 where there is no"
                    " torchrun, is stopped or its node is gone. This rank is in stage"
                    f" '{stage}' of iteration {iteration}"
                    + "".join(f"\n    at {each}" for each in where)
                )

    def _speak(self, hang: Hang) -> None:
        # Two ranks may each think that the other is lost: one message is enough.
        if self._store is None or self._store.add(_SPOKEN, 1) == 1:
            self._end(hang.message)

    def _end(self, message: str) -> None:
        """Write the message and end this process, whatever state its other threads are in."""
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
        self._over.set()  # the other thread has nothing to add
        os._exit(self._status)
