"""One process for each implementation, so that memory and patches of one are not another's.

A worker builds its subject, then does what it is told, one command at a time; it computes nothing
while another one is visited.
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
    """Something to measure."""

    def check(self) -> tuple[float, Digests]:
        """A number the forward pass ends in, and digests of all gradients."""
        ...

    def sample(self) -> Mapping[str, float]:
        """Do it once; `seconds`, and whatever else is worth keeping."""
        ...


Builder = Callable[..., Subject]
"""Called in the worker with the device and the entry's arguments."""


@dataclass(frozen=True)
class Entry:
    """An implementation to measure."""

    build: Builder
    """A function of a module, which the worker imports."""
    arguments: tuple[Any, ...]
    """Handed to `build`; small."""
    package: str | None = None
    """What must be installed for it, if that is optional."""
    load: Callable[[], None] | None = None
    """Imports what `build` would import, so that this is not counted as its memory."""


class Worker:
    """The parent's handle of a worker.

    Args:
        entry: what to build.
        device: where to compute.
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

    def ask(self, command: str) -> Any:
        """Have the worker do `check`, `sample`, `restart_peak` or `peak_bytes`.

        Raises:
            RuntimeError: the worker failed; the message is its traceback.
        """
        try:
            self._connection.send(command)
            outcome, value = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with status {self._process.exitcode} during '{command}'; -9 means"
                " that it was killed, most often for its memory"
            ) from error
        if outcome == "failed":
            raise RuntimeError(f"a worker failed during '{command}':\n{value}")
        return value

    def close(self) -> None:
        """End the process and free what it held."""
        self._connection.close()
        self._process.join()


def _serve(
    connection: Connection, entry: Entry, device: torch.device, num_threads: int | None
) -> None:
    """A worker's life: each command is answered by an outcome and a value."""
    subject: Subject | None = None
    memory: PeakMemory | None = None
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        try:
            if subject is None or memory is None:
                if num_threads is not None:
                    torch.set_num_threads(num_threads)
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                if entry.load is not None:
                    entry.load()
                memory = PeakMemory(device)
                subject = entry.build(device, *entry.arguments)
            connection.send(("done", _obey(command, subject, memory)))
        except Exception:
            # Not swallowed: the parent raises it again.
            connection.send(("failed", traceback.format_exc()))


def _obey(command: str, subject: Subject, memory: PeakMemory) -> Any:
    if command == "check":
        return subject.check()
    if command == "sample":
        return dict(subject.sample())
    if command == "restart_peak":
        return memory.restart()
    if command == "peak_bytes":
        return memory.peak_bytes()
    raise ValueError(f"unknown command '{command}'")
