"""Batches for one data parallel rank, and the state that makes a resume exact."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.trainer.data.sampler import Dealer, Phase, read_records
from megatron.trainer.data.source import Source
from megatron.trainer.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch of next-token prediction."""

    tokens: Tensor
    """[b, s] int64 input ids."""
    labels: Tensor
    """[b, s] int64, the token that follows each position."""
    loss_mask: Tensor
    """[b, s] float32, 1 where the loss counts."""
    position_ids: Tensor
    """[b, s] int64, where each token stands in its document; [1, s] when all rows are alike."""

    documents: Tensor | None = None
    """[b, s of the whole sequence] int64 numbers of the documents that attention keeps apart; None
    lets it cross them."""
    loss_tokens: Tensor | None = None
    """[] float32, what the sum of losses is divided by; None means the sum of loss_mask."""
    places: Tensor | None = None
    """[s] int64, where this rank's positions stand in the sequence; None means all of it."""

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on a device."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return Batch(**{name: value.to(device) for name, value in present.items()})

    def attention_mask(self) -> Tensor | None:
        """Return [b, 1, s, s of the whole sequence] bool, True where a query must not look.

        None where plain causal attention says it all.
        """
        if self.documents is None:
            return None
        everywhere = torch.arange(self.documents.shape[1], device=self.documents.device)
        places = everywhere if self.places is None else self.places
        others = self.documents[:, places, None] != self.documents[:, None, :]  # [b, s, s whole]
        future = everywhere[None, :] > places[:, None]  # [s, s whole]
        return (others | future)[:, None]


def make_batch(windows: Sequence[npt.NDArray[np.int64]]) -> Batch:
    """Stack windows of [s + 1] tokens each into a micro-batch of [b, s]."""
    ids = torch.from_numpy(np.stack(windows))  # [b, s + 1]
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # [b, s]
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.shape, dtype=torch.float32),
        position_ids=torch.arange(tokens.shape[1])[None],
    )


def split_global_batch(
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[range]:
    """Say which samples of a global batch are this rank's, one range a micro-batch.

    Micro-batch j of rank r holds samples (j * data_parallel_size + r) * micro_batch_size and on.
    The micro-batches are thus the same sets of samples for every data parallel size, only computed
    elsewhere, and losses that are not linear in the batch (load balancing) stay comparable.

    Raises:
        ConfigError: The sizes do not divide, or the rank does not exist.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ConfigError(
            f"data parallel rank {data_parallel_rank} does not exist among {data_parallel_size}"
            f" ranks; it must be 0 to {data_parallel_size - 1}; pass the rank in its own group"
        )
    step = micro_batch_size * data_parallel_size
    if step < 1 or global_batch_size < 1 or global_batch_size % step:
        raise ConfigError(
            f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x data"
            f" parallel size ({micro_batch_size} x {data_parallel_size} = {step}); change"
            " --global-batch-size, --micro-batch-size or the number of ranks"
        )
    first = data_parallel_rank * micro_batch_size
    starts = range(first, global_batch_size, step)
    return [range(start, start + micro_batch_size) for start in starts]


class SampleStream:
    """The training samples of a run, in an order that depends on phases, weights and seed alone.

    Every rank holds a stream of its own and advances it by whole global batches; only its own
    windows are read.

    Args:
        sources: What to draw from.
        phases: The run's phases and their mixtures of those sources.
        seq_length: Positions in a sample (s).
        seed: The run's seed, kept in the state so that a resume with another one is noticed.

    Raises:
        DataError: A weight is not positive.
        ValueError: A source of another length, or a phase that does not fit, as in `Dealer`.
    """

    def __init__(
        self, sources: Sequence[Source], phases: Sequence[Phase], *, seq_length: int, seed: int
    ) -> None:
        for source in sources:
            if source.seq_length != seq_length:
                raise ValueError(
                    f"source {source.name!r} has seq_length {source.seq_length}, not {seq_length}"
                )
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self._by_name = {source.name: source for source in sources}
        windows = {source.name: source.num_windows for source in sources}
        self._dealer = Dealer(phases, seed=seed, windows=windows)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The run's own phases in order."""
        return self._dealer.phases

    @property
    def phase(self) -> str | None:
        """Name of the phase of the sample drawn last; None in a run without named phases."""
        return self._dealer.phase.name

    def shares(self, phase: int) -> list[float]:
        """Return the share of each of a phase's sources, in their order there; the sum is 1."""
        return [float(weight) for weight in self._dealer.blends[phase].weights]

    @property
    def consumed_samples(self) -> int:
        """Samples drawn so far over all ranks, those of a run that was branched from included."""
        return self._dealer.num_drawn

    def consumed_per_source(self) -> dict[str, int]:
        """Return the samples drawn so far over all ranks, by source name."""
        return self._dealer.drawn_per_source()

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
            DataError: The last phase is used up.
        """
        mine = split_global_batch(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        drawn = [self._dealer.draw() for _ in range(global_batch_size)]
        batches = []
        for samples in mine:
            picks = [drawn[i] for i in samples]
            batches.append(make_batch([self._by_name[name].window(n) for name, n in picks]))
        return batches

    def leave_out(self, counts: Mapping[str, int]) -> None:
        """Pass over the next samples of each source by name; phases get no shorter by them."""
        self._dealer.leave_out(counts)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain JSON values, the same on every rank."""
        return {
            "consumed_samples": self.consumed_samples,
            "consumed_per_source": self.consumed_per_source(),
            "seq_length": self.seq_length,
            "phases": self._dealer.state_dict(),
        }

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
        return self._dealer.load_state_dict(records)

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
        return self._dealer.inherit(records)

    def _check_length(self, state: Mapping[str, Any], remedy: str) -> None:
        if state.get("seq_length") != self.seq_length:
            raise DataError(
                "the checkpoint was trained on other data: seq_length: checkpoint"
                f" {state.get('seq_length')}, this run {self.seq_length}; a resumed run must read"
                f" the same samples; {remedy}"
            )


@dataclass(frozen=True)
class ValidationSet:
    """Windows that are only evaluated: in the order of the data, the same at each evaluation."""

    name: str
    """Name in tables and metrics."""
    source: Source
    """Where the windows come from."""

    def num_global_batches(self, requested: int, *, global_batch_size: int) -> int:
        """Return how many whole global batches an evaluation takes: requested, or what exists.

        Raises:
            DataError: Not even one exists. Ask once before training, not only at the first
                evaluation.
        """
        windows = self.source.num_windows
        if windows is None:
            return requested
        if windows < global_batch_size:
            raise DataError(
                f"validation set {self.name!r} has {windows} windows of {self.source.seq_length}"
                f" tokens, but one global batch takes {global_batch_size}; it must fill at least"
                " one; give it more data, or lower --global-batch-size"
            )
        return min(requested, windows // global_batch_size)

    def batches(
        self,
        num_global_batches: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each global batch, from the set's start.

        Args:
            num_global_batches: At most how many; fewer when the set ends before.
            global_batch_size: Samples in a global batch.
            micro_batch_size: Samples in a micro-batch (b).
            data_parallel_rank: This rank.
            data_parallel_size: Ranks that share a global batch.

        Raises:
            ConfigError: As `split_global_batch`.
            DataError: As `num_global_batches`.
        """
        mine = split_global_batch(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        count = self.num_global_batches(num_global_batches, global_batch_size=global_batch_size)
        for start in range(0, count * global_batch_size, global_batch_size):
            yield [make_batch([self.source.sequential(start + n) for n in part]) for part in mine]
