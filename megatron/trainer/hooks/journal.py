"""Locks a run directory; records the events of its run, and how the run ended."""

import datetime
import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron.trainer.errors import ConfigError, UserError
from megatron.trainer.hooks.base import Hook
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.file_lock import NO_LOCKS, wait_for_lock
from megatron.trainer.records.record_file import RecordError, append_record
from megatron.trainer.records.run_dir import ENDED_NAME, EVENTS_NAME

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"

LOCK_PATIENCE_S = 10.0
"""How long to wait for the lock of a process that is just ending, as when a job restarts."""

_NO_LOCKS = {*NO_LOCKS, errno.EINVAL}


class EarlyStop(Protocol):
    """Says why a run stopped before its last step, as `health.stop.Stop` does."""

    @property
    def reason(self) -> str:
        """Return `signal`, `duration` or `interval`."""

    @property
    def detail(self) -> str:
        """Return the same in words."""

    @property
    def requeue(self) -> bool:
        """Return whether the run should be started again."""


class Journal(Hook):
    """Writes the events and the end of a run, on the one rank that has a directory.

    Args:
        directory: the run directory, which must exist; None writes nothing.
        train_iters: steps to have done when the run ends, as the config has them; `on_start` says
            what they are after other batches.
    """

    def __init__(self, directory: Path | None, *, train_iters: int) -> None:
        self._directory = directory
        self._train_iters = train_iters
        self._lock = _take_lock(directory) if directory is not None else None
        self.iteration = 0
        """Steps done."""
        self.saved: int | None = None
        """Steps that the newest checkpoint holds, of those that this process knows."""
        if directory is not None:
            (directory / ENDED_NAME).unlink(missing_ok=True)

    def on_start(self, iteration: int, train_iters: int) -> None:
        """Note the steps to have done when the run ends."""
        self._train_iters = train_iters

    def on_step(self, iteration: int, loss: float) -> None:
        """Count the step."""
        self.iteration = iteration

    def on_save(self, iteration: int, *, seconds: float, blocked_seconds: float) -> None:
        """Record the event `save`; steps may have been done since it began."""
        self.saved = iteration
        self._append(
            iteration,
            "save",
            f"{seconds:.1f} s, training stood still for {blocked_seconds:.1f} s",
            seconds=round(seconds, 3),
            blocked_seconds=round(blocked_seconds, 3),
        )

    def on_event(self, iteration: int, name: str, detail: str = "", **more: Any) -> None:
        """Append to `events.jsonl`."""
        self.iteration = iteration
        self._append(iteration, name, detail, **more)

    def _append(self, iteration: int, name: str, detail: str, **more: Any) -> None:
        if self._directory is not None:
            record = {"iteration": iteration, "event": name, "time": _now(), "detail": detail}
            append_record(self._directory / EVENTS_NAME, {**record, **more})

    def end(self, stop: EarlyStop | None) -> None:
        """Record and log how the run ended: finished, or stopped early."""
        done = self.iteration >= self._train_iters
        where = f"iteration {self.iteration} of {self._train_iters}"
        if self.saved == self.iteration and self._directory is not None:
            kept = f"checkpoint of iteration {self.saved} in {self._directory}"
        else:
            kept = "nothing new to save" if self._directory is not None else "nothing saved"
        if stop is None:
            self._end("finished", "", requeue=False)
            logger.info("run ended: finished, %s; %s", where, kept)
        else:
            self._end(stop.reason, stop.detail, requeue=stop.requeue)
            more = "" if done else "; not finished, start it again with --load to go on"
            logger.info("run ended: %s, %s; %s%s", stop.detail, where, kept, more)

    @contextmanager
    def recording_errors(self) -> Iterator[None]:
        """Record an error that ends the run, and raise it; release the lock in any case."""
        try:
            yield
        except BaseException as error:
            text = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            try:
                self._end("error", text, requeue=False)
            except (OSError, RecordError) as failed:  # a full disk may be what ended the run
                logger.warning("could not write %s: %s", ENDED_NAME, failed)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Release the directory for another run."""
        if self._lock is not None:
            self._lock.close()

    def _end(self, reason: str, detail: str, *, requeue: bool) -> None:
        if self._directory is None:
            return
        record = {
            "reason": reason,
            "detail": detail,
            "iteration": self.iteration,
            "train_iters": self._train_iters,
            "saved_iteration": self.saved,
            "requeue": requeue,
            "time": _now(),
        }
        write_text(self._directory / ENDED_NAME, json.dumps(record) + "\n")
        self.on_event(self.iteration, "end", f"{reason}: {detail}" if detail else reason)


def open_journal(save: str | None, *, rank: int, train_iters: int) -> Journal:
    """Open this rank's journal; on rank 0 make, check and lock the run directory.

    Raises:
        ConfigError: nothing can be written there, or another run holds it.
    """
    if rank != 0 or save is None:
        return Journal(None, train_iters=train_iters)
    directory = Path(save)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"probe")
        return Journal(directory, train_iters=train_iters)
    except OSError as error:
        raise ConfigError(
            f"cannot write to --save {directory}: {error.strerror}; give a directory on a disk with"
            " room that this user may write to"
        ) from error


def _take_lock(directory: Path) -> TextIO | None:
    """Hold the directory until this process ends; None where the file system has no locks.

    Raises:
        ConfigError: another process holds it.
    """
    path = directory / LOCK_NAME
    # Opened for appending: until the lock is ours, its text is the other run's.
    lock = path.open("a+", encoding="utf-8")
    try:
        wait_for_lock(lock, LOCK_PATIENCE_S)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read(200).strip() or "another process"
        lock.close()
        raise ConfigError(
            f"--save {directory} is in use by {holder}; two runs in one directory would"
            " destroy each other's records; stop that one, or give another --save"
        ) from error
    except OSError as error:
        lock.close()
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no locks (%s); nothing keeps a second run out",
            directory,
            error.strerror,
        )
        return None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
    lock.flush()
    return lock


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
