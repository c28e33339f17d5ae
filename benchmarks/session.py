"""Visits workers in turns, after having made sure that all of them compute the same."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.ceilings import build_ceilings
from benchmarks.digests import Digests, largest_difference
from benchmarks.timing import interleave
from benchmarks.workers import Entry, Worker

CEILINGS = "ceilings"
NATIVE = "native"
"""What the names of the project's own implementations begin with."""

# Loss: of a few units. Gradients: relative to the norm. fp32 sums in another order; in bf16 a token
# whose k-th and next expert are close may choose the other one besides.
LOSS_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
GRADIENT_LIMITS = {torch.float32: 2e-3, torch.bfloat16: 1.5e-1}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how."""

    entries: Mapping[str, Entry]
    """By name."""
    device: torch.device
    """Where."""
    dtype: torch.dtype
    """Of the matrix products."""
    rounds: int
    """How often each is timed."""
    warmup: int
    """Untimed visits before."""
    gemm_size: int
    """Of the ceiling's product."""
    num_threads: int | None = None
    """CPU threads of a worker."""
    is_fresh: bool = False
    """Build anew for every visit, so that only one implementation is in memory at a time."""


@dataclass(kw_only=True)
class Measured:
    """What was found of one implementation."""

    missing: str | None = None
    """What is not installed; None when it was measured."""
    loss: float | None = None
    """What the compared forward pass ended in."""
    gradient_difference: float | None = None
    """Largest relative difference to the one compared with."""
    samples: list[dict[str, float]] = field(default_factory=list)
    """One a round, in the order of the rounds."""
    peak_bytes: int | None = None
    """While it was timed."""

    def series(self, key: str) -> list[float]:
        """One figure of every round."""
        return [sample[key] for sample in self.samples]


class DifferentMathsError(Exception):
    """Two implementations do not compute the same; their times must not be compared."""


class Session:
    """The workers of a plan.

    Args:
        plan: what to measure.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._standing: dict[str, Worker] = {}
        self.found = {
            name: Measured(missing=_missing(entry)) for name, entry in plan.entries.items()
        }
        self.ceilings: list[dict[str, float]] = []

    def run(self) -> None:
        """Compare, warm up, time; results are in `found` and `ceilings`.

        Raises:
            DifferentMathsError: an implementation computes something else.
            RuntimeError: a worker failed.
        """
        try:
            if not self._plan.is_fresh:
                for name in self._present():
                    with self._worker(name):
                        pass  # it starts while the others do
            self._compare()
            for name in self._present():
                self._warm_up(name)
            names = [CEILINGS, *self._present()]
            for _, name in interleave(names, self._plan.rounds):
                self._visit(name)
            for name in self._present():
                if not self._plan.is_fresh:
                    self.found[name].peak_bytes = self._standing[name].ask("peak_bytes")
        finally:
            for worker in self._standing.values():
                worker.close()

    def _present(self) -> list[str]:
        return [name for name, measured in self.found.items() if measured.missing is None]

    def _compare(self) -> None:
        """Everyone's loss and gradients with those of the first that is no implementation of ours.

        Without such a peer there is nothing to compare with, and the differences stay None.
        """
        digests: dict[str, Digests] = {}
        for name in self._present():
            with self._worker(name) as worker:
                self.found[name].loss, digests[name] = worker.ask("check")
        peers = [name for name in self._present() if not name.startswith(NATIVE)]
        for name in self._present() if peers else ():
            self._compare_pair(name, peers[0], digests)

    def _compare_pair(self, name: str, peer: str, digests: Mapping[str, Digests]) -> None:
        mine, theirs = self.found[name], self.found[peer]
        assert mine.loss is not None and theirs.loss is not None
        difference, tensor = largest_difference(digests[name], digests[peer])
        loss_limit, limit = LOSS_LIMITS[self._plan.dtype], GRADIENT_LIMITS[self._plan.dtype]
        if not abs(mine.loss - theirs.loss) <= loss_limit * max(1.0, abs(theirs.loss)):
            raise DifferentMathsError(
                f"the loss of {name} is {mine.loss:.6g}, that of {peer} {theirs.loss:.6g}; the"
                f" limit is {loss_limit:g}. They do not compute the same, so nothing was timed"
            )
        if not difference <= limit:
            raise DifferentMathsError(
                f"the gradient of {tensor} of {name} differs from that of {peer} by"
                f" {difference:.3g} of its norm; the limit is {limit:g}. They do not compute the"
                " same, so nothing was timed"
            )
        mine.gradient_difference = difference

    def _warm_up(self, name: str) -> None:
        if self._plan.is_fresh:
            return  # each visit does
        with self._worker(name) as worker:
            self._prepare(worker)

    def _prepare(self, worker: Worker) -> None:
        for _ in range(self._plan.warmup):
            worker.ask("sample")
        worker.ask("restart_peak")

    def _visit(self, name: str) -> None:
        with self._worker(name) as worker:
            if name == CEILINGS:
                self.ceilings.append(worker.ask("sample"))
                return
            if self._plan.is_fresh:
                self._prepare(worker)
            measured = self.found[name]
            measured.samples.append(worker.ask("sample"))
            if self._plan.is_fresh:
                measured.peak_bytes = max(measured.peak_bytes or 0, worker.ask("peak_bytes"))

    @contextmanager
    def _worker(self, name: str) -> Iterator[Worker]:
        """The standing worker, or one for this visit alone."""
        plan = self._plan
        if name in self._standing:
            yield self._standing[name]
            return
        ceilings = Entry(build_ceilings, (plan.dtype, plan.gemm_size))
        entry = ceilings if name == CEILINGS else plan.entries[name]
        worker = Worker(entry, device=plan.device, num_threads=plan.num_threads)
        if name == CEILINGS or not plan.is_fresh:
            self._standing[name] = worker
            yield worker
            return
        try:
            yield worker
        finally:
            worker.close()


def _missing(entry: Entry) -> str | None:
    """The entry's package if it is not installed."""
    if entry.package is None or importlib.util.find_spec(entry.package) is not None:
        return None
    return entry.package
