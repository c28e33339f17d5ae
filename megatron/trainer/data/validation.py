"""Reads the batches of sets that are only evaluated."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from megatron.trainer.data.batch import Batch, split_global_batch
from megatron.trainer.data.read_ahead import Loading, ReadAhead
from megatron.trainer.data.source import Source, read_batch
from megatron.trainer.errors import DataError


@dataclass(frozen=True)
class ValidationSet:
    """Reads windows that are only evaluated: in the order of the data, the same each time."""

    name: str
    """Name in tables and metrics."""
    source: Source
    """Where the windows come from."""
    loading: Loading = field(default_factory=Loading)
    """How batches are read."""

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
            DataError: As `num_global_batches`, or a token is outside the vocabulary.
        """
        mine = split_global_batch(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        count = self.num_global_batches(num_global_batches, global_batch_size=global_batch_size)
        starts = range(0, count * global_batch_size, global_batch_size)
        with closing(ReadAhead(self._read(starts, mine), self.loading)) as reader:
            yield from reader

    def _read(self, starts: range, micro_batches: Sequence[range]) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the global batch that begins at each of `starts`."""
        for start in starts:
            yield [
                read_batch(
                    [(self.source, start + n) for n in samples],
                    pin_memory=self.loading.pin_memory,
                )
                for samples in micro_batches
            ]
