"""Runs Python programs that nobody has read, each in a sandbox that is thrown away.

Bubblewrap gives a program file system, processes and network of its own: the system's programs and
Python to read, a small directory to write, nothing else. What `boot` does within sets limits.
docs/security.md says what is contained, and what is not.
"""

import json
import logging
import os
import queue
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.trainer.errors import ConfigError, DataError
from moe_app.evaluate.execution import prison
from moe_app.evaluate.execution.prison import ProgramLimits
from moe_app.evaluate.execution.system_calls import filter_program

logger = logging.getLogger("evaluate")

Boundary = Literal["bubblewrap", "limits"]
"""What keeps a program in: namespaces with limits, or limits alone."""
ProgramEnding = Literal["passed", "failed", "ended", "time", "output"]
"""By itself; by an exception; its process was gone before; for too much time; for too much output.
"""

_MOST_VERDICT_BYTES = 1 << 14
_CHUNK = 1 << 16
_PROBE = "import decimal, subprocess\nopen('written', 'w').close()"
"""Needs Python's own files, which an unprivileged user may be unable to read."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Says how a program ended."""

    ending: ProgramEnding
    error: str
    """The exception, or how the process ended; empty where it passed."""
    output: str
    """What it wrote, cut to the limit."""

    @property
    def passed(self) -> bool:
        """Return whether the program ran to its end without an exception."""
        return self.ending == "passed"


class Sandbox:
    """Runs programs, several side by side.

    Args:
        boundary: what keeps them in.
        limits: of each program.
        workers: programs that run side by side.

    Raises:
        ConfigError: this machine does not allow it; the message names the remedy.
    """

    def __init__(self, boundary: Boundary, *, limits: ProgramLimits, workers: int) -> None:
        self._limits = limits
        self._workers = workers
        self._bwrap = shutil.which("bwrap") if boundary == "bubblewrap" else None
        self._python, self._base = prison.find_python(sys.executable, sys.base_prefix)
        self._users = prison.program_users()
        self._boot = Path(__file__).with_name("boot.py").read_text("utf-8")
        self._filter = filter_program() if self._bwrap else b""
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            self._slots.put(slot)
        self._check(boundary)

    def run_all(self, programs: Iterable[str]) -> Iterator[Outcome]:
        """Yield the outcome of each program, in order."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="sandbox") as pool:
            yield from pool.map(self.run, programs)

    def run(self, program: str) -> Outcome:
        """Run one program.

        Raises:
            DataError: it could not be started.
        """
        slot = self._slots.get()
        uid = None if self._users is None else self._users[slot % len(self._users)]
        try:
            with ExitStack() as stack:
                return self._run(program, uid, stack)
        finally:
            self._slots.put(slot)

    def _check(self, boundary: Boundary) -> None:
        """Try a program that is known to end well."""
        if boundary == "limits":
            logger.warning(
                "--unsafe-execution limits: generated programs run WITHOUT a sandbox; they can read"
                " the files of this machine and use its network; only their time, memory, processes"
                " and output are limited"
            )
        elif self._bwrap is None:
            raise _refusal("bubblewrap is not installed", "install it (apt-get install bubblewrap)")
        try:
            outcome = self.run(_PROBE)
        except DataError as error:
            raise _refusal(
                str(error),
                "let the system allow user namespaces (sysctl kernel.unprivileged_userns_clone=1,"
                " kernel.apparmor_restrict_unprivileged_userns=0, in a container"
                " --security-opt seccomp=unconfined), and have bubblewrap 0.6 or newer",
            ) from error
        if not outcome.passed:
            raise _refusal(
                f"a program that only imports and writes a file ended so: {outcome.ending}:"
                f" {outcome.error} {outcome.output.strip()}",
                f"let every user read {self._base}, or use a Python that every user can read",
            )

    def _run(self, program: str, uid: int | None, stack: ExitStack) -> Outcome:
        key = secrets.token_hex(16)
        verdict, theirs = os.pipe()
        stack.callback(os.close, verdict)
        has_namespace = self._bwrap is not None and uid is None
        job = {
            "program": program,
            "key": key,
            "verdict": theirs,
            "uid": uid,
            "limits": prison.resource_limits(self._limits, uid=uid, has_namespace=has_namespace),
        }
        with ExitStack() as given:
            given.callback(os.close, theirs)
            job_fd = _memory_file(json.dumps(job).encode(), given)
            process = self._start(job_fd, theirs, uid, given, stack)
        stack.callback(_end, process)
        assert process.stdout is not None
        watch = _Watch(process, self._limits, keeps_all=self._bwrap is not None)
        output, said = watch.follow(process.stdout.fileno(), verdict)
        return _judge(process, watch, output, said, key)

    def _start(
        self, job_fd: int, verdict: int, uid: int | None, given: ExitStack, stack: ExitStack
    ) -> subprocess.Popen[bytes]:
        """Start the process of a program; it reads its job from `job_fd`."""
        before: list[str] = []
        passed = [verdict]
        folder = "/"
        if self._bwrap is not None:
            filter_fd = _memory_file(self._filter, given)
            passed.append(filter_fd)
            before = prison.bubblewrap_command(
                self._bwrap,
                self._base,
                filter_fd=filter_fd,
                has_own_user=uid is not None,
                limits=self._limits,
            )
        else:
            folder = tempfile.mkdtemp(prefix="program-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if uid is not None:
                os.chown(folder, uid, uid)
        return subprocess.Popen(
            [*before, self._python, "-I", "-S", "-B", "-c", self._boot],
            stdin=job_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=prison.ENVIRONMENT if self._bwrap else {**prison.ENVIRONMENT, "HOME": folder},
            cwd=folder,
            pass_fds=passed,
            start_new_session=True,
        )


class _Watch:
    """Reads what a program says, and ends it where it goes beyond a limit.

    Args:
        process: of the program.
        limits: of the program.
        keeps_all: whether nothing that the program starts outlives `process`.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], limits: ProgramLimits, *, keeps_all: bool
    ) -> None:
        self._process = process
        self._limits = limits
        self._keeps_all = keeps_all
        self._deadline = time.monotonic() + limits.seconds
        self.broke: Literal["time", "output"] | None = None
        """The limit that it went beyond."""

    def follow(self, output: int, verdict: int) -> tuple[bytes, bytes]:
        """Return what the program wrote to its output, and to the pipe for its verdict."""
        texts = {output: bytearray(), verdict: bytearray()}
        most = {output: self._limits.output_bytes, verdict: _MOST_VERDICT_BYTES}
        with selectors.DefaultSelector() as selector:
            for pipe in texts:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map() and not self._is_over(texts[verdict]):
                left = None if self.broke else max(0.0, self._deadline - time.monotonic())
                ready = selector.select(left)
                if not ready:
                    self._stop("time")
                for each, _ in ready:
                    chunk = os.read(each.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(each.fd)
                    texts[each.fd] += chunk
                    if len(texts[each.fd]) > most[each.fd]:
                        del texts[each.fd][most[each.fd] :]
                        self._stop("output")
        if not self.broke and texts[verdict].count(b"\n") < 2:
            self._await_end()
        return bytes(texts[output]), bytes(texts[verdict])

    def _is_over(self, said: bytearray) -> bool:
        """Return whether nothing more is to come; where processes may be left, they hold pipes."""
        return not self._keeps_all and (self.broke is not None or said.count(b"\n") >= 2)

    def _stop(self, limit: Literal["time", "output"]) -> None:
        self.broke = self.broke or limit
        _kill(self._process)

    def _await_end(self) -> None:
        """Wait until a program is gone that closed its pipes without a verdict."""
        try:
            self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._stop("time")


def _judge(
    process: subprocess.Popen[bytes], watch: _Watch, output: bytes, said: bytes, key: str
) -> Outcome:
    """Return the outcome of a program.

    Raises:
        DataError: it never began.
    """
    text = output.decode("utf-8", errors="replace")
    began, _, rest = said.partition(b"\n")
    if watch.broke is not None:
        reason = {"time": "it took too long", "output": "it wrote too much"}[watch.broke]
        return Outcome(ending=watch.broke, error=reason, output=text)
    if began != b"began":
        raise DataError(
            f"a program could not be started: {text.strip()[-500:] or 'no reason given'}"
        )
    verdict = _parse(rest)
    if verdict.get("key") != key:
        return Outcome(ending="ended", error=_status(process.wait()), output=text)
    passed = verdict.get("passed") is True
    error = "" if passed else str(verdict.get("error"))
    return Outcome(ending="passed" if passed else "failed", error=error, output=text)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _status(status: int) -> str:
    """Describe the exit status of a process before its verdict; bubblewrap adds 128 to signals."""
    number = -status if status < 0 else status - 128
    with suppress(ValueError):
        return f"the process was ended by {signal.Signals(number).name}"
    return f"the process ended itself with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group, and give its pipe back."""
    _kill(process)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, with whatever is left of its group: a dead leader keeps the group's number."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _memory_file(content: bytes, stack: ExitStack) -> int:
    """Return a file in memory that the next process reads from its beginning."""
    descriptor = os.memfd_create("job")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _refusal(reason: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"generated programs cannot be run safely here: {reason}; {remedy}, evaluate on another"
        " machine, or give --unsafe-execution limits in a container that holds nothing of value"
    )
