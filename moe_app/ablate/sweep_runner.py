"""Trains the jobs of a sweep, some side by side, and stops them when it is stopped."""

import contextlib
import fcntl
import os
import shlex
import signal
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron.trainer.errors import ConfigError, printable
from megatron.trainer.io.file_lock import NO_LOCKS
from megatron.trainer.records.history import duration
from megatron.trainer.runtime import signals
from megatron.trainer.runtime.launch import child_environment, num_cores
from moe_app.ablate.studies_file import Sweep
from moe_app.ablate.sweep_jobs import LOG_NAME, SweepJob, check_recipe, commands_of, write_recipe

POLL_S = 0.2
_LOCK_NAME = ".sweep_lock"
_REPORT_S = 60.0
_GRACE_S = 90.0
"""A run that was asked to stop has so long to save."""
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 14


class SweepStopped(Exception):
    """Says that the user, or a scheduler, has ended the sweep."""


@dataclass
class _Running:
    """Holds a job that is being trained."""

    job: SweepJob
    left: deque[list[str]]
    """Command lines to come."""
    log: IO[bytes]
    lock: IO[bytes]
    """Held until the process ends, also if this one is killed before."""
    began: float
    first: int
    """Steps that were done when it was started."""
    process: "subprocess.Popen[bytes] | None" = None


@dataclass
class SweepOutcome:
    """Counts what became of the jobs."""

    finished: list[SweepJob] = field(default_factory=list)
    """Done, now or before."""
    failed: list[SweepJob] = field(default_factory=list)
    """Ended with an error, or with something left to do."""
    waiting: list[SweepJob] = field(default_factory=list)
    """Not started, because what they begin from has failed."""

    @property
    def status(self) -> int:
        """Return the exit status."""
        return 1 if self.failed or self.waiting else 0


class SweepRunner:
    """Trains jobs.

    Args:
        sweep: what they are of.
        jobs: in an order in which each is behind what it begins from.
        side_by_side: processes at a time.
        say: prints a line.
    """

    def __init__(
        self,
        sweep: Sweep,
        jobs: Sequence[SweepJob],
        *,
        side_by_side: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self._sweep = sweep
        self._side_by_side = side_by_side
        self._say = say
        states = {id(job): job.state for job in jobs}
        self.outcome = SweepOutcome(finished=[job for job in jobs if states[id(job)] == "finished"])
        self._left = [job for job in jobs if states[id(job)] != "finished"]
        self._total = len(jobs)
        self._running: list[_Running] = []
        self._elsewhere: set[Path] = set()
        self._step_seconds: list[float] = []
        threads = max(1, num_cores() // (side_by_side * sweep.nproc_per_node))
        self._environment = child_environment(threads=threads)

    def run(self) -> SweepOutcome:
        """Train all jobs.

        Raises:
            SweepStopped: SIGTERM or Ctrl-C came; what was running has been stopped.
        """
        self._say(
            f"{self._total} runs: {len(self.outcome.finished)} finished before,"
            f" {len(self._left)} to train, {self._side_by_side} side by side"
        )
        reported = time.monotonic()
        try:
            while self._left or self._running:
                if signals.received() is not None:
                    raise SweepStopped
                self._start_what_can()
                self._look()
                if time.monotonic() - reported > _REPORT_S:
                    self._report()
                    reported = time.monotonic()
                time.sleep(POLL_S)
        except (KeyboardInterrupt, SweepStopped):
            self._stop()
            raise SweepStopped from None
        except BaseException:
            self._stop()
            raise
        return self.outcome

    def _start_what_can(self) -> None:
        failed = {job.directory for job in (*self.outcome.failed, *self.outcome.waiting)}
        finished = {job.directory for job in self.outcome.finished}
        own = {job.directory for job in self._left} | {each.job.directory for each in self._running}
        for job in list(self._left):
            if job.source in failed:
                self._left.remove(job)
                self.outcome.waiting.append(job)
                failed.add(job.directory)
                self._say(f"{job}: not started, because {job.source} has failed")
            elif len(self._running) < self._side_by_side and (
                job.source is None or job.source in finished or job.source not in own
            ):
                self._try_to_start(job)

    def _try_to_start(self, job: SweepJob) -> None:
        """Start a job, unless another process trains it, or has done so."""
        job.directory.mkdir(parents=True, exist_ok=True)
        lock = _lock_of(job)
        if lock is None:
            if job.directory not in self._elsewhere:
                self._elsewhere.add(job.directory)
                self._say(f"{job}: another process trains it; waiting for that")
            return
        try:
            check_recipe(job)  # another sweep may have begun it meanwhile
            write_recipe(self._sweep, job)
        except ConfigError as error:
            lock.close()
            self._left.remove(job)
            self.outcome.failed.append(job)
            self._say(str(error))
            return
        self._left.remove(job)
        if job.state == "finished":
            lock.close()
            self.outcome.finished.append(job)
            self._say(f"{job}: finished by another process")
            return
        self._start(job, lock)

    def _start(self, job: SweepJob, lock: IO[bytes]) -> None:
        first = job.iteration if job.state == "interrupted" else 0
        running = _Running(
            job=job,
            left=deque(commands_of(job)),
            log=(job.directory / LOG_NAME).open("ab"),
            lock=lock,
            began=time.monotonic(),
            first=first,
        )
        self._running.append(running)
        whence = f", from iteration {first}" if first else ""
        self._say(f"{job}: started ({job.cfg.training.train_iters} steps{whence})")
        self._next_command(running)

    def _next_command(self, running: _Running) -> None:
        command = running.left.popleft()
        running.log.write(f"$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
        running.log.flush()
        # In a session of its own, so that Ctrl-C comes here alone.
        running.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=running.log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            pass_fds=(running.lock.fileno(),),
            start_new_session=True,
        )

    def _look(self) -> None:
        for running in list(self._running):
            assert running.process is not None
            status = running.process.poll()
            if status is None:
                continue
            if status == 0 and running.left:
                self._next_command(running)
                continue
            self._running.remove(running)
            running.log.close()
            running.lock.close()
            self._end(running, status)

    def _end(self, running: _Running, status: int) -> None:
        job, seconds = running.job, time.monotonic() - running.began
        if status == 0 and job.state == "finished":
            self.outcome.finished.append(job)
            steps = job.cfg.training.train_iters - running.first
            if steps > 0:
                self._step_seconds.append(seconds / steps)
            self._say(
                f"{job}: finished in {duration(seconds)};"
                f" {len(self.outcome.finished)} of {self._total}{self._estimate()}"
            )
            return
        self.outcome.failed.append(job)
        log = job.directory / LOG_NAME
        how = f"ended with status {status}" if status else "ended before its last step"
        self._say(f"{job}: {how}; the end of {log}:\n{tail_of(log)}")

    def _estimate(self) -> str:
        """Return how long the rest will take, by the seconds a step of those that finished."""
        if not self._step_seconds:
            return ""
        left = sum(
            max(0, job.cfg.training.train_iters - job.iteration)
            for job in (*self._left, *(each.job for each in self._running))
        )
        seconds = left * statistics.mean(self._step_seconds) / self._side_by_side
        return f"; about {duration(seconds)} left"

    def _report(self) -> None:
        parts = [
            f"{each.job} at {each.job.iteration} of {each.job.cfg.training.train_iters}"
            for each in self._running
        ]
        done = f"{len(self.outcome.finished)} of {self._total} finished"
        self._say(f"{done}; {', '.join(parts)}{self._estimate()}")

    def _stop(self) -> None:
        """Ask what runs to save and stop; end it if it does not."""
        processes = [each.process for each in self._running if each.process is not None]
        if processes:
            self._say(f"stopping {len(processes)} runs; a second start goes on with them")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for each in self._running:
            each.log.close()
            each.lock.close()
        self._running.clear()


def _lock_of(job: SweepJob) -> IO[bytes] | None:
    """Lock a job's directory against other sweeps; None if another holds it."""
    file = (job.directory / _LOCK_NAME).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:  # the trainer has a lock of its own
            file.close()
            raise
    return file


def tail_of(path: Path) -> str:
    """Return the last lines of a log."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return printable("\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]))
