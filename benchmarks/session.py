"""Compares the results of all workers, then times them in turns."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.ceilings import build_ceilings
from benchmarks.digests import Digests, largest_difference
from benchmarks.timing import interleave
from benchmarks.workers import Entry, Worker, WorkerError

CEILINGS = "ceilings"
NATIVE = "native"
"""Prefix of the names of the project's own implementations."""

# Loss: absolute, for losses of a few units. Gradients: relative to the norm. fp32 differs by the
# order of sums; in bf16 tokens whose k-th and next expert are close may also choose differently.
LOSS_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
GRADIENT_LIMITS = {torch.float32: 2e-3, torch.bfloat16: 1.5e-1}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Describes what to measure, and how."""

    entries: Mapping[str, Entry]
    """Implementations by name."""
    device: torch.device
    """Device to measure on."""
    dtype: torch.dtype
    """dtype of the matrix products."""
    rounds: int
    """Timed visits of each."""
    warmup: int
    """Untimed visits before them."""
    gemm_size: int
    """Size of the GEMM that is the ceiling."""
    num_threads: int | None = None
    """CPU threads of a worker; None leaves torch's default."""
    is_fresh: bool = False
    """Rebuild for every visit, so that only one implementation is in memory at a time."""
    peer_timeout_s: float | None = None
    """How long a command of a peer may take, its building and tuning included; None: any time."""

    @property
    def visit_warmup(self) -> int:
        """Return the untimed samples of each visit, after which nothing is built or allocated.

        On a GPU workers give their caches back after a visit, so that all fit beside each other.
        """
        return self.warmup if self.is_fresh else int(self.device.type == "cuda")


@dataclass(kw_only=True)
class Measured:
    """Holds the measurements of one implementation."""

    missing: str | None = None
    """Package that is not installed; None if it is."""
    failed: str | None = None
    """Why it was left out, in a line; None if it was measured."""
    loss: float | None = None
    """Scalar of the compared forward pass."""
    gradient_difference: float | None = None
    """Largest relative difference from the reference."""
    samples: list[dict[str, float]] = field(default_factory=list)
    """One sample per round, in order."""
    peak_bytes: int | None = None
    """Peak memory while it was timed."""

    @property
    def is_present(self) -> bool:
        """Return whether it is installed and has not failed."""
        return self.missing is None and self.failed is None

    def series(self, key: str) -> list[float]:
        """Return one figure of every round."""
        return [sample[key] for sample in self.samples]


class DifferentMathsError(ValueError):
    """Reports that two implementations compute different results, so times are not comparable."""


class Session:
    """Runs the workers of a plan.

    Args:
        plan: what to measure.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._persistent: dict[str, Worker] = {}
        self._num_samples: Counter[str] = Counter()
        self.found = {
            name: Measured(missing=_missing(entry)) for name, entry in plan.entries.items()
        }
        self.ceilings: list[dict[str, float]] = []

    def run(self) -> None:
        """Compare, warm up and time; results are in `found` and `ceilings`.

        Raises:
            DifferentMathsError: no peer computes what `native` does, or another implementation
                of the project does not.
            WorkerError: `native` failed, or the ceilings; whatever else fails is left out.
        """
        try:
            if not self._plan.is_fresh:
                for name in self._present():
                    with self._worker(name):
                        pass  # workers start concurrently
            self._compare()
            for name in self._present():
                self._warm_up(name)
            names = [CEILINGS, *self._present()]
            for _, name in interleave(names, self._plan.rounds):
                self._visit(name)
            for name in self._present():
                if not self._plan.is_fresh:
                    with self._without_failing(name), self._worker(name) as worker:
                        self.found[name].peak_bytes = self._call(name, worker, "peak_bytes")
        finally:
            for worker in self._persistent.values():
                worker.close()

    @property
    def exit_status(self) -> int:
        """Return 0 if all of the project's own implementations were measured, 1 otherwise."""
        own = [measured for name, measured in self.found.items() if is_own(name)]
        return int(any(measured.failed is not None for measured in own))

    def _present(self) -> list[str]:
        return [name for name, measured in self.found.items() if measured.is_present]

    def _compare(self) -> None:
        """Compare all losses and gradients; leave out peers that compute something else.

        Without a peer there is no reference, and the differences stay None.
        """
        digests: dict[str, Digests] = {}
        for name in self._present():
            with self._without_failing(name), self._worker(name) as worker:
                self.found[name].loss, digests[name] = self._call(name, worker, "check")
        reference = self._reference(digests)
        if reference is None:
            return
        for name in self._present():
            self._compare_pair(name, reference, digests)

    def _reference(self, digests: Mapping[str, Digests]) -> str | None:
        """Return the first peer that agrees with the first implementation, and drop the others.

        Where none agrees, nobody can tell which of them is wrong.
        """
        peers = [name for name in self._present() if not is_own(name)]
        first = next(iter(self._present()), None)
        different: dict[str, str] = {}
        for peer in peers:
            try:
                self._compare_pair(first or peer, peer, digests)
            except ValueError as error:
                different[peer] = str(error)
        agreeing = [name for name in peers if name not in different]
        if different and not agreeing:
            raise DifferentMathsError(
                f"{next(iter(different.values()))}. No peer computes what {first} does, so nothing"
                " was timed"
            )
        for name, reason in different.items():
            self._drop(name, reason, reason)
        return agreeing[0] if agreeing else None

    def _compare_pair(self, name: str, peer: str, digests: Mapping[str, Digests]) -> None:
        mine, theirs = self.found[name], self.found[peer]
        assert mine.loss is not None and theirs.loss is not None
        difference, tensor = largest_difference(digests[name], digests[peer])
        loss_limit, limit = LOSS_LIMITS[self._plan.dtype], GRADIENT_LIMITS[self._plan.dtype]
        if not abs(mine.loss - theirs.loss) <= loss_limit * max(1.0, abs(theirs.loss)):
            raise DifferentMathsError(
                f"the loss of {name} is {mine.loss:.6g}, that of {peer} {theirs.loss:.6g}; the"
                f" limit is {loss_limit:g}"
            )
        if not difference <= limit:
            raise DifferentMathsError(
                f"the gradient of {tensor} of {name} differs from that of {peer} by"
                f" {difference:.3g} of its norm; the limit is {limit:g}"
            )
        mine.gradient_difference = difference

    def _warm_up(self, name: str) -> None:
        if self._plan.is_fresh:
            return  # each visit warms up
        with self._without_failing(name), self._worker(name) as worker:
            self._prepare(name, worker, self._plan.warmup)
            self._release(name, worker)

    def _call(self, name: str, worker: Worker, command: str, *arguments: int) -> Any:
        """Run a command; a peer has a limit, the project's own have none."""
        is_limited = name != CEILINGS and not is_own(name)
        timeout_s = self._plan.peer_timeout_s if is_limited else None
        return worker.call(command, *arguments, timeout_s=timeout_s)

    def _sample(self, name: str, worker: Worker) -> dict[str, float]:
        """Take the next sample, on data that no earlier sample of the name had.

        The numbers are the same for all names and outlive workers that are rebuilt.
        """
        number = self._num_samples[name]
        self._num_samples[name] += 1
        found: dict[str, float] = self._call(name, worker, "sample", number)
        return found

    def _prepare(self, name: str, worker: Worker, samples: int) -> None:
        for _ in range(samples):
            self._sample(name, worker)
        self._call(name, worker, "restart_peak")

    def _visit(self, name: str) -> None:
        if name != CEILINGS and not self.found[name].is_present:
            return
        with self._without_failing(name), self._worker(name) as worker:
            if name == CEILINGS:
                self.ceilings.append(self._sample(name, worker))
                self._release(name, worker)
                return
            if self._plan.is_fresh:
                self._prepare(name, worker, self._plan.visit_warmup)
            else:
                for _ in range(self._plan.visit_warmup):
                    self._sample(name, worker)
            measured = self.found[name]
            measured.samples.append(self._sample(name, worker))
            if self._plan.is_fresh:
                peak = self._call(name, worker, "peak_bytes")
                measured.peak_bytes = max(measured.peak_bytes or 0, peak)
            self._release(name, worker)

    def _release(self, name: str, worker: Worker) -> None:
        """Have a worker give its caches back, now that its visit is over."""
        if self._plan.device.type == "cuda":
            self._call(name, worker, "release")

    @contextmanager
    def _without_failing(self, name: str) -> Iterator[None]:
        """Leave an implementation out whose worker fails in the context; not without `native`."""
        try:
            yield
        except WorkerError as error:
            if name in (CEILINGS, NATIVE):
                raise
            self._drop(name, error.reason, str(error))

    def _drop(self, name: str, reason: str, details: str) -> None:
        """Leave an implementation out from now on, say why, and free its memory."""
        print(f"{name} is left out: {details}", file=sys.stderr, flush=True)
        self.found[name].failed = reason
        if name in self._persistent:
            self._persistent.pop(name).close()

    @contextmanager
    def _worker(self, name: str) -> Iterator[Worker]:
        """Yield the persistent worker, or one for this visit alone."""
        plan = self._plan
        if name in self._persistent:
            yield self._persistent[name]
            return
        ceilings = Entry(build_ceilings, (plan.dtype, plan.gemm_size))
        entry = ceilings if name == CEILINGS else plan.entries[name]
        worker = Worker(entry, device=plan.device, num_threads=plan.num_threads)
        if name == CEILINGS or not plan.is_fresh:
            self._persistent[name] = worker
            yield worker
            return
        try:
            yield worker
        finally:
            worker.close()


def is_own(name: str) -> bool:
    """Return whether an implementation is the project's."""
    return name == NATIVE or name.startswith(f"{NATIVE}:")


def _missing(entry: Entry) -> str | None:
    """Return the entry's package if it is not installed."""
    if entry.package is None or importlib.util.find_spec(entry.package) is not None:
        return None
    return entry.package
