"""Computes which tokens sample n of a source is; no order is stored.

The scheme is OLMoE's (allenai/OLMo, MemMapDataset and IterableDataset): a file's tokens, documents
end to end, are cut into consecutive windows of seq_length; the remainder is dropped; attention
crosses documents; each epoch is a fresh permutation of the windows. Each window is read with one
token more than seq_length, so that its last position has a label too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.batch import Batch, make_batch, mask_rows
from megatron.trainer.data.index_file import DocumentStarts
from megatron.trainer.data.indexed import TokenFacts, check_ids
from megatron.trainer.data.permutation import KeyedPermutation
from megatron.trainer.data.repetition import RepetitionRule, find_repetition
from megatron.trainer.errors import DataError


class Source(Protocol):
    """Declares what a stream asks of what it draws from."""

    @property
    def name(self) -> str:
        """Return the name in tables and metrics."""

    @property
    def seq_length(self) -> int:
        """Return the positions in a sample (s)."""

    @property
    def seed(self) -> int:
        """Return the seed of the order, or of the tokens."""

    @property
    def num_windows(self) -> int | None:
        """Return the samples in an epoch; None means there is no end."""

    @property
    def num_tokens(self) -> int | None:
        """Return the tokens in an epoch; None means there is no end."""

    @property
    def num_documents(self) -> int | None:
        """Return the documents in an epoch; None when there are none."""

    def windows_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the window that each sample is; samples [m] are counted over all epochs."""

    @property
    def fingerprint(self) -> str | None:
        """Return what tells its tokens from others; None where name and seed do."""

    def read_window(self, n: int) -> npt.NDArray[np.integer]:
        """Return the n-th window in the order of the data: [s + 1] token ids."""

    def read_starts(self, n: int) -> npt.NDArray[np.int64] | None:
        """Return where in the n-th window documents begin: positions of 1 to s - 1.

        None where documents are not kept apart.
        """


class RowSource(Source, Protocol):
    """Declares a source whose samples are texts with masks, not windows of tokens alone.

    A sample is one or more rows: packed texts, or one text a row. The batch has `segments` and
    `texts`: `index` int64, the text's row in the data, and `role` int64, what it is there. Of
    preferences, texts 2i and 2i + 1 are the chosen (0) and the rejected (1) of one row. Of judged
    completions (KTO), they are one that is desirable (1) or not (0), and a mismatched one (2).
    """

    def read_rows(self, numbers: Sequence[int], *, pin_memory: bool) -> Batch:
        """Return a micro-batch of samples in the order of the data."""


def read_batch(
    reads: Sequence[tuple[Source, int]],
    *,
    pin_memory: bool = False,
    repetition: RepetitionRule | None = None,
) -> Batch:
    """Read a micro-batch.

    Args:
        reads: The source and the number of each window.
        pin_memory: As in `make_batch`.
        repetition: Which windows have no label that counts; None counts all.
    """
    first = reads[0][0]
    if hasattr(first, "read_rows"):
        if any(source is not first for source, _ in reads):
            raise DataError(
                "a micro-batch would mix texts of several sources; texts have one source; give all"
                " files to one --train-data"
            )
        rows: Batch = first.read_rows([n for _, n in reads], pin_memory=pin_memory)
        return rows
    windows = [source.read_window(n) for source, n in reads]
    starts = [found for source, n in reads if (found := source.read_starts(n)) is not None]
    is_known = len(starts) == len(windows)
    batch = make_batch(windows, starts if is_known else None, pin_memory=pin_memory)
    if repetition is None:
        return batch
    repeating = [find_repetition(window[:-1], repetition) is not None for window in windows]
    return mask_rows(batch, repeating)


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowSource:
    """Cuts a contiguous range of a token file into windows, reshuffled every epoch.

    Raises:
        DataError: The range is too short for one window.
    """

    name: str
    """Name in tables, metrics and checkpoints; two sources of one size differ in order by it."""
    tokens: npt.NDArray[np.integer]
    """[num_tokens] the file's tokens."""
    start_token: int
    """First token of the range."""
    stop_token: int
    """One past the last token of the range."""
    seq_length: int
    """Return the positions in a sample (s)."""
    seed: int
    """With epoch and name, the key of the order."""
    num_documents: int | None = None
    """Documents in the range, for the table."""
    vocab_size: int | None = None
    """When given, every window's ids are checked against it."""
    prefix: str | None = None
    """Path of the token file, for messages."""
    facts: TokenFacts | None = None
    """What the whole file is."""
    document_starts: DocumentStarts | None = None
    """Where documents begin in the file; None where they are not kept apart."""

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise DataError(
                f"source {self.name!r} has {self.num_tokens} tokens, but one window takes"
                f" {self.seq_length + 1} (--seq-length {self.seq_length} and one label); a source"
                " must hold at least one window; give more data, another --split or a shorter"
                " --seq-length"
            )

    @property
    def fingerprint(self) -> str | None:
        """Return what tells the file from others."""
        return None if self.facts is None else self.facts.fingerprint

    @property
    def num_tokens(self) -> int:
        """Return the tokens in the range."""
        return self.stop_token - self.start_token

    @property
    def num_windows(self) -> int:
        """Return the samples in an epoch; the remainder of the range is dropped."""
        return (self.num_tokens - 1) // self.seq_length

    def windows_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the window that each sample is; samples [m] are counted over all epochs."""
        epochs, positions = np.divmod(samples, self.num_windows)
        windows = np.empty_like(positions)  # [m]
        for epoch in np.unique(epochs).tolist():
            order = KeyedPermutation(self.num_windows, (self.seed, epoch, self.name))
            is_in_epoch = epochs == epoch
            windows[is_in_epoch] = order(positions[is_in_epoch])
        return windows

    def read_window(self, n: int) -> npt.NDArray[np.integer]:
        """Return the n-th window in the order of the data: [s + 1] token ids, not copied.

        Raises:
            IndexError: There are not that many windows.
            DataError: A token is outside the vocabulary; other ranks may not see it.
        """
        if not 0 <= n < self.num_windows:
            raise IndexError(f"window {n} of source {self.name!r}: it has {self.num_windows}")
        first = self.start_token + n * self.seq_length
        ids = np.asarray(self.tokens[first : first + self.seq_length + 1])
        if self.vocab_size is not None:
            try:
                check_ids(ids, self.vocab_size, file=f"source {self.name!r}", first_token=first)
            except DataError as error:
                error.is_local = True
                raise
        return ids

    def read_starts(self, n: int) -> npt.NDArray[np.int64] | None:
        """Return where in the n-th window documents begin: positions of 1 to s - 1."""
        if self.document_starts is None:
            return None
        first = self.start_token + n * self.seq_length
        return self.document_starts.between(first + 1, first + self.seq_length) - first


@dataclass(frozen=True, kw_only=True)
class MockSource:
    """Makes uniformly random tokens without end, a function of seed and n, for benchmarks."""

    name: str = "mock"
    """Return the name in tables and metrics."""
    vocab_size: int
    """Ids are 0 to vocab_size - 1."""
    seq_length: int
    """Return the positions in a sample (s)."""
    seed: int
    """What the tokens follow from."""
    num_windows: None = None
    """There is no end."""
    num_tokens: None = None
    """There is no end."""
    num_documents: None = None
    """There are none."""
    fingerprint: None = None
    """Vocabulary and seed say it all."""
    eod: int | None = None
    """Id that ends a document; None where documents are not kept apart."""

    def windows_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples' own numbers, for there is no order to shuffle."""
        return samples

    def read_window(self, n: int) -> npt.NDArray[np.integer]:
        """Return sample n: [s + 1] token ids."""
        generator = np.random.default_rng((self.seed, n))
        return generator.integers(0, self.vocab_size, self.seq_length + 1, dtype=np.int64)

    def read_starts(self, n: int) -> npt.NDArray[np.int64] | None:
        """Return the positions of sample n that follow an `eod`."""
        if self.eod is None:
            return None
        return np.flatnonzero(self.read_window(n)[:-2] == self.eod) + 1
