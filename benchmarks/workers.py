"""Runs each implementation in its own process, which isolates memory and patches.

A worker builds its subject, then runs one command at a time; it is idle while another one runs.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from benchmarks.digests import Digests
from benchmarks.memory import PeakMemory


class Subject(Protocol):
    """Declares an implementation to measure."""

    def check(self) -> tuple[float, Digests]:
        """Return a scalar of the forward pass, and digests of all gradients."""
        ...

    def sample(self, number: int) -> Mapping[str, float]:
        """Run once on the data of a number, the same in all peers; return `seconds` and others."""
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
        self._process = context.Process(
            target=_serve, args=(theirs, entry, device, num_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, command: str, *arguments: int) -> Any:
        """Have the worker run `check`, `sample`, `restart_peak` or `peak_bytes`.

        Args:
            command: its name.
            arguments: for `sample` the number of its data.

        Raises:
            RuntimeError: the worker failed; the message is its traceback.
        """
        try:
            self._connection.send((command, arguments))
            outcome, value = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with status {self._process.exitcode} during '{command}'; -9 means"
                " that it was killed, usually out of memory"
            ) from error
        if outcome == "failed":
            raise RuntimeError(f"a worker failed during '{command}':\n{value}")
        return value

    def close(self) -> None:
        """End the process and free its memory."""
        self._connection.close()
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
            connection.send(("done", answer(command, arguments, subject, memory)))
        except Exception:
            # The parent raises it.
            connection.send(("failed", traceback.format_exc()))


def answer(command: str, arguments: tuple[int, ...], subject: Subject, memory: PeakMemory) -> Any:
    """Run one command."""
    if command == "check":
        return subject.check()
    if command == "sample":
        return dict(subject.sample(*arguments))
    if command == "restart_peak":
        return memory.restart()
    if command == "peak_bytes":
        return memory.peak_bytes()
    raise ValueError(f"unknown command '{command}'")
