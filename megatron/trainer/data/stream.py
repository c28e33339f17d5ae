"""Reads the batches of one data parallel rank, and keeps the state that makes a resume exact."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from megatron.trainer.data.batch import Batch, split_global_batch
from megatron.trainer.data.phase_records import (
    drawn_sources,
    read_fingerprints,
    read_records,
)
from megatron.trainer.data.read_ahead import Loading, ReadAhead
from megatron.trainer.data.repetition import RepetitionRule
from megatron.trainer.data.sampler import Phase, Sampler
from megatron.trainer.data.source import Source, read_batch
from megatron.trainer.errors import DataError

Samples = tuple[Sampler, list[Batch]]
"""The sampler after a global batch, and this rank's micro-batches of it."""


def _read_global_batches(
    sampler: Sampler,
    sources: Sequence[Source],
    micro_batches: Sequence[range],
    *,
    size: int,
    pin_memory: bool,
    repetition: RepetitionRule | None,
) -> Iterator[Samples]:
    """Read one global batch after the other.

    Args:
        sampler: Where to begin; advanced by nobody else.
        sources: What it draws from, in its order.
        micro_batches: This rank's samples of each global batch.
        size: Samples of a global batch over all ranks.
        pin_memory: As in `make_batch`.
        repetition: As in `read_batch`.

    Yields:
        The sampler after each global batch, and this rank's micro-batches of it.
    """
    mine = np.concatenate([np.array(each) for each in micro_batches])  # [samples]
    while True:
        drawn_sources, drawn_numbers = sampler.draw(size)
        picked, numbers = drawn_sources[mine], drawn_numbers[mine]  # [samples]
        windows = np.empty_like(numbers)
        for index in np.unique(picked).tolist():
            windows[picked == index] = sources[index].windows_of(numbers[picked == index])
        reads = zip(picked.tolist(), windows.tolist(), strict=True)
        batches = []
        for samples in micro_batches:
            picks = [(sources[index], window) for index, window in islice(reads, len(samples))]
            batches.append(read_batch(picks, pin_memory=pin_memory, repetition=repetition))
        yield sampler.copy(), batches


class SampleStream:
    """Reads the training samples of a run, in an order of phases, weights and seed alone.

    Every rank holds a stream of its own and advances it by whole global batches; only its own
    windows are read, ahead of time if `loading` says so. Counts and states are of the batches that
    were returned, not of those that are read ahead.

    Args:
        sources: What to draw from.
        phases: The run's phases and their mixtures of those sources.
        seq_length: Positions in a sample (s).
        seed: The run's seed, kept in the state so that a resume with another one is noticed.
        loading: How batches are read; None reads each when it is asked for.
        repetition: As in `read_batch`.

    Raises:
        DataError: A weight is not positive.
        ValueError: A source of another length, or a phase that does not fit, as in `Sampler`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        seq_length: int,
        seed: int,
        loading: Loading | None = None,
        repetition: RepetitionRule | None = None,
    ) -> None:
        for source in sources:
            if source.seq_length != seq_length:
                raise ValueError(
                    f"source {source.name!r} has seq_length {source.seq_length}, not {seq_length}"
                )
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self._loading = loading or Loading()
        self._repetition = repetition
        windows = {source.name: source.num_windows for source in sources}
        self._sampler = Sampler(phases, seed=seed, windows=windows)
        self._sizes: tuple[int, list[range]] | None = None
        self._reader: ReadAhead[Samples] | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the run's own phases in order."""
        return self._sampler.phases

    @property
    def phase(self) -> str | None:
        """Return the name of the last drawn sample's phase; None in a run without named phases."""
        return self._sampler.phase.name

    def shares(self, phase: int) -> list[float]:
        """Return the share of each of a phase's sources, in their order there; the sum is 1."""
        return [float(weight) for weight in self._sampler.blends[phase].weights]

    @property
    def consumed_samples(self) -> int:
        """Return the samples drawn so far over all ranks, those of a branch's trunk included."""
        return self._sampler.num_drawn

    @property
    def trained_samples(self) -> tuple[int, int]:
        """Return the samples of all global batches so far, and those without a branch's trunk.

        Samples that a rewind left out are consumed, but in no global batch that counts.
        """
        return self._sampler.num_trained

    def consumed_per_source(self) -> dict[str, int]:
        """Return the samples drawn so far over all ranks, by source name."""
        return self._sampler.drawn_per_source()

    def next_global_batch(
        self,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> list[Batch]:
        """Advance by one global batch and return this rank's micro-batches of it.

        Raises:
            ConfigError: As `split_global_batch`; the stream has not advanced then.
            DataError: All phases are over, or a token is outside the vocabulary; the stream
                has not advanced then.
        """
        mine = split_global_batch(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        sizes = (global_batch_size, mine)
        if self._reader is None or self._sizes != sizes or not self._reader.is_usable:
            self.stop_reading()
            self._sizes = sizes
            self._reader = ReadAhead(
                _read_global_batches(
                    self._sampler.copy(),
                    self.sources,
                    mine,
                    size=global_batch_size,
                    pin_memory=self._loading.pin_memory,
                    repetition=self._repetition,
                ),
                self._loading,
            )
        try:
            self._sampler, batches = next(self._reader)
        except BaseException:
            self.stop_reading()
            raise
        return batches

    def stop_reading(self) -> None:
        """Drop what is read ahead and let the thread end; the next batch starts it again."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def skip(self, counts: Mapping[str, int]) -> None:
        """Skip the next samples of each source by name; phases get no shorter by them."""
        self.stop_reading()
        self._sampler.skip(counts)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain JSON values, the same on every rank."""
        state = {
            "consumed_samples": self.consumed_samples,
            "consumed_per_source": self.consumed_per_source(),
            "seq_length": self.seq_length,
            "phases": self._sampler.state_dict(),
        }
        known = {each.name: each.fingerprint for each in self.sources if each.fingerprint}
        return {**state, "fingerprints": known} if known else state

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue where another stream over the same data stood.

        Phases still to come may be others than that stream's, and the current one may end at
        another sample that is not yet past.

        Args:
            state: What `state_dict` returned.

        Returns:
            What is planned otherwise than by that stream, a line each.

        Raises:
            DataError: What was drawn so far is of other data, another length, blend or seed, or
                the state contradicts itself; all differences are listed. The stream is unchanged
                then.
        """
        records = read_records(state)
        self._check_length(state, "restore the data flags, or start the data anew with --finetune")
        sampler = self._sampler.copy()
        try:
            notes = sampler.load_state_dict(records)
        except DataError as error:
            if renamed := self._renamed(state):
                raise DataError(f"{error}; {'; '.join(renamed)}") from error
            raise
        if others := self._exchanged(state, records):
            raise DataError(
                f"the checkpoint was trained on other data: {'; '.join(others)}; a resumed run must"
                " read the same samples; restore the token files, or start the data anew with"
                " --finetune"
            )
        self.stop_reading()
        self._sampler = sampler
        return notes

    def inherit(self, state: Mapping[str, Any]) -> list[str]:
        """Begin, as a branch, after what another run has drawn.

        Args:
            state: That run's `state_dict`.

        Returns:
            Where each source begins, a line each: under the same seed where that run stopped.

        Raises:
            DataError: The state contradicts itself, is of another length, or a source that should
                go on has changed.
        """
        records = read_records(state)
        self._check_length(state, "give the branch that --seq-length")
        sampler = self._sampler.copy()
        notes = sampler.inherit(records)
        if others := self._exchanged(state, records):
            raise DataError(
                f"the run that is branched from had other data: {'; '.join(others)}; a source that"
                " continues must be the same; restore its token files, or shuffle anew with another"
                " --seed"
            )
        self.stop_reading()
        self._sampler = sampler
        return notes

    def _exchanged(
        self, state: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """Return a line for each source that goes on, but holds other tokens than it did."""
        before = read_fingerprints(state)
        begun = set(drawn_sources(records, seed=self.seed))
        return [
            f"source {each.name!r} holds other tokens: checkpoint {before[each.name]:.16}, this run"
            f" {each.fingerprint:.16}"
            for each in self.sources
            if each.name in begun and each.fingerprint and each.name in before
            if each.fingerprint != before[each.name]
        ]

    def _renamed(self, state: Mapping[str, Any]) -> list[str]:
        """Return a line for each source that the checkpoint knows by another name."""
        names = {each.name for each in self.sources}
        before = {text: name for name, text in read_fingerprints(state).items()}
        return [
            f"source {each.name!r} is the checkpoint's {before[each.fingerprint]!r} under another"
            f" name: write {before[each.fingerprint]}=PREFIX"
            for each in self.sources
            if each.fingerprint in before and before[each.fingerprint] not in names
        ]

    def _check_length(self, state: Mapping[str, Any], remedy: str) -> None:
        if state.get("seq_length") != self.seq_length:
            raise DataError(
                "the checkpoint was trained on other data: seq_length: checkpoint"
                f" {state.get('seq_length')}, this run {self.seq_length}; a resumed run must read"
                f" the same samples; {remedy}"
            )
