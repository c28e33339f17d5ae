"""Batches for one data parallel rank, and the state that makes a resume exact."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.trainer.data.blend import Blend
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

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on a device."""
        return Batch(
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            loss_mask=self.loss_mask.to(device),
            position_ids=self.position_ids.to(device),
        )


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
    """The training samples of a run, in an order that depends on the seed alone.

    Every rank holds a stream of its own and advances it by whole global batches; only its own
    windows are read.

    Args:
        sources: What to draw from.
        weights: Each source's share of the samples; only ratios matter.
        seq_length: Positions in a sample (s).
        seed: The run's seed, kept in the state so that a resume with another one is noticed.

    Raises:
        DataError: The weights are not positive.
        ValueError: Not one weight a source, or a source of another length.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], *, seq_length: int, seed: int
    ) -> None:
        if len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources, but {len(weights)} weights")
        for source in sources:
            if source.seq_length != seq_length:
                raise ValueError(
                    f"source {source.name!r} has seq_length {source.seq_length}, not {seq_length}"
                )
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self._blend = Blend(weights)

    @property
    def weights(self) -> list[float]:
        """Each source's share of the samples; the sum is 1."""
        return [float(weight) for weight in self._blend.weights]

    @property
    def consumed_samples(self) -> int:
        """Samples drawn so far over all ranks."""
        return self._blend.num_drawn

    def consumed_per_source(self) -> dict[str, int]:
        """Return the samples drawn so far over all ranks, by source name."""
        counts = self._blend.counts
        return {source.name: int(counts[i]) for i, source in enumerate(self.sources)}

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
        """
        mine = split_global_batch(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        drawn = [self._blend.draw() for _ in range(global_batch_size)]
        batches = []
        for samples in mine:
            picks = [drawn[i] for i in samples]
            batches.append(make_batch([self.sources[s].window(n) for s, n in picks]))
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, as plain JSON values, the same on every rank."""
        return {
            "consumed_samples": self.consumed_samples,
            "consumed_per_source": [int(count) for count in self._blend.counts],
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream over the same data stood.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The state is of other data, another length, blend or seed, or contradicts
                itself; all differences are listed. The stream is unchanged then.
        """
        differences = [
            f"{key}: checkpoint {state.get(key)}, this run {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differences:
            raise DataError(
                f"the checkpoint was trained on other data: {'; '.join(differences)}; a resumed run"
                " must read the same samples; restore the data flags, or start the data anew with"
                " --finetune"
            )
        counts, total = state.get("consumed_per_source"), state.get("consumed_samples")
        if (
            not isinstance(counts, list)
            or len(counts) != len(self.sources)
            or not all(type(count) is int and count >= 0 for count in counts)
            or sum(counts) != total
        ):
            raise DataError(
                f"the checkpoint's data state has consumed_per_source {counts} and consumed_samples"
                f" {total}; there must be {len(self.sources)} counts >= 0 that add up to the"
                " latter; load another checkpoint"
            )
        self._blend.counts[:] = counts

    def _identity(self) -> dict[str, Any]:
        """Return what two streams must share to yield the same samples, as JSON values."""
        return {
            "seq_length": self.seq_length,
            "seed": self.seed,
            "sources": [source.name for source in self.sources],
            "windows_per_epoch": [source.num_windows for source in self.sources],
            "weights": self.weights,
        }


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
