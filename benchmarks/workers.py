"""Runs each implementation in its own process, which isolates memory and patches.

A worker builds its subject, then runs one command at a time; it is idle while another one runs.
"""

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import psutil
import torch

from benchmarks.digests import Digests
from benchmarks.memory import PeakMemory

_REASON_LENGTH = 160
_END_S = 30.0
"""How long a worker may take to end once it was told to, seconds."""


class WorkerError(RuntimeError):
    """Reports that a worker failed; the message is its traceback, where it has one.

    Args:
        message: all that is known.
        reason: one line of it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Subject(Protocol):
    """Declares an implementation to measure."""

    def check(self) -> tuple[float, Digests]:
        """Return a scalar of the forward pass, and digests of all gradients."""
        ...

    def sample(self, number: int) -> Mapping[str, float]:
        """Run once on the data of a number, the same in all peers; return `seconds` and others."""
        ...

    def release(self) -> None:
        """Drop what the last command left in memory and the next does not need: gradients."""
        ...


Builder = Callable[..., Subject]
"""Called in the worker with the device and the entry's arguments."""


@dataclass(frozen=True)
class Entry:
    """Describes how to build an implementation."""

    build: Builder
    """A function of a module, which the worker imports."""
    arguments: tuple[Any, ...]
    """Arguments of `build`, sent to the worker by pickle."""
    package: str | None = None
    """Optional package that it needs."""
    load: Callable[[], None] | None = None
    """Imports the modules of `build` in advance, so that they do not count as its memory."""


class Worker:
    """Controls a worker process from its parent.

    Args:
        entry: implementation to build.
        device: device to compute on.
        num_threads: CPU threads; None leaves torch's default.
    """

    def __init__(self, entry: Entry, *, device: torch.device, num_threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon, which may start no processes: QuACK compiles in some.
        self._process = context.Process(target=_serve, args=(theirs, entry, device, num_threads))
        self._process.start()
        theirs.close()

    def call(self, command: str, *arguments: int, timeout_s: float | None = None) -> Any:
        """Have the worker run `check`, `sample`, `release`, `restart_peak` or `peak_bytes`.

        Args:
            command: its name.
            arguments: for `sample` the number of its data.
            timeout_s: how long it may take; then the worker is killed. None waits.

        Raises:
            WorkerError: the worker failed, or took too long.
        """
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(timeout_s):
                self._kill()
                reason = f"'{command}' took more than {timeout_s:g} s"
                raise WorkerError(f"a worker was killed: {reason}", reason)
            outcome, value = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            reason = (
                f"a worker ended with status {self._process.exitcode} during '{command}'; -9 means"
                " that it was killed, usually out of memory"
            )
            raise WorkerError(reason, reason) from error
        if outcome == "failed":
            reason, text = value
            raise WorkerError(f"a worker failed during '{command}':\n{text}", reason)
        return value

    def close(self) -> None:
        """End the process and free its memory."""
        self._connection.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._kill()

    def _kill(self) -> None:
        """Kill the process and all that it has started."""
        try:
            started = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            started = []
        self._process.kill()
        for each in started:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                pass  # it ended by itself
        self._process.join()


def _serve(
    connection: Connection, entry: Entry, device: torch.device, num_threads: int | None
) -> None:
    """Run commands in the worker; reply to each with an outcome and a value."""
    subject: Subject | None = None
    memory: PeakMemory | None = None
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            if subject is None or memory is None:
                if num_threads is not None:
                    torch.set_num_threads(num_threads)
                if device.type == "cuda":
                    torch.cuda.set_device(device.index or 0)
                if entry.load is not None:
                    entry.load()
                memory = PeakMemory(device)
                subject = entry.build(device, *entry.arguments)
            found = answer(command, arguments, subject, memory)
            if device.type == "cuda" and command == "check":
                # Takes tenths of a second, and only building and comparing leave cycles.
                gc.collect()
                _release(subject)
            connection.send(("done", found))
        except Exception as error:
            # The parent raises it.
            connection.send(("failed", (one_line(error), traceback.format_exc())))


def answer(command: str, arguments: tuple[int, ...], subject: Subject, memory: PeakMemory) -> Any:
    """Run one command."""
    if command == "check":
        return subject.check()
    if command == "sample":
        return dict(subject.sample(*arguments))
    if command == "release":
        return _release(subject)
    if command == "restart_peak":
        return memory.restart()
    if command == "peak_bytes":
        return memory.peak_bytes()
    raise ValueError(f"unknown command '{command}'")


def one_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message, which says what it is."""
    first = next(iter(str(error).strip().splitlines()), "")
    return ": ".join(filter(None, (type(error).__name__, first)))[:_REASON_LENGTH]


def _release(subject: Subject) -> None:
    """Give memory back that others need meanwhile; a worker keeps its weights and their state."""
    subject.release()
    torch.cuda.empty_cache()
