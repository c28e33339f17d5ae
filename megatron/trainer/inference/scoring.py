"""Log-probabilities of given tokens, in batches of similar lengths."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

_IDLE = (0, 0)
"""A row for ranks that keep others company."""


class Scorer(Protocol):
    """A model that tells probabilities, on one rank or over many."""

    @property
    def is_speaker(self) -> bool:
        """Whether this rank hands on the results of the ranks that share a batch."""
        ...

    def log_probs(self, tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor | None:
        """Log-probabilities [b, n] of `labels` [b, n], or None where they do not arrive."""
        ...

    def logits(self, tokens: Tensor, position_ids: Tensor) -> Tensor | None:
        """Logits [b, n, v], or None where they do not arrive."""
        ...


def plan_batches(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Put rows of similar lengths together, the longest first.

    Args:
        lengths: tokens of each row that the model computes.
        tokens_per_batch: most tokens of a batch, padding included; a longer row is a batch of its
            own.

    Returns:
        Batches of indices into `lengths`; each index is in one of them.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def score(
    model: Scorer,
    rows: Mapping[int, Sequence[int]],
    *,
    tokens_per_batch: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> dict[int, list[float]]:
    """Score rows; a collective call.

    Args:
        model: the model.
        rows: token ids by number, the same on every rank.
        tokens_per_batch: see `plan_batches`.
        data_parallel_rank: which share of the batches is this rank's.
        data_parallel_size: shares.

    Returns:
        On a speaker, for each of its share's rows by number, the log-probability of every token
        from the second on. Elsewhere nothing.
    """
    scores: dict[int, list[float]] = {}
    share = _share(rows, tokens_per_batch, data_parallel_rank, data_parallel_size)
    for numbers, batch in share:
        tokens, position_ids, labels = pad(batch)
        found = model.log_probs(tokens, position_ids, labels)
        if found is not None and model.is_speaker:
            for number, row, values in zip(numbers, batch, found.tolist(), strict=False):
                scores[number] = values[: len(row) - 1]
    return scores


def compute_logits(
    model: Scorer,
    rows: Mapping[int, Sequence[int]],
    *,
    tokens_per_batch: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> dict[int, Tensor]:
    """Logits of rows; arguments and collective nature as those of `score`.

    Returns:
        On a speaker, for each of its share's rows by number, fp32 logits [tokens - 1, v] on the
        CPU: those after every token but the last. Elsewhere nothing.
    """
    logits: dict[int, Tensor] = {}
    share = _share(rows, tokens_per_batch, data_parallel_rank, data_parallel_size)
    for numbers, batch in share:
        tokens, position_ids, _ = pad(batch)
        found = model.logits(tokens, position_ids)
        if found is not None and model.is_speaker:
            for number, row, values in zip(numbers, batch, found, strict=False):
                logits[number] = values[: len(row) - 1].to("cpu", torch.float32)
    return logits


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, positions and labels [b, longest row - 1], padded on the right.

    Args:
        rows: b lists of at least two ids.
    """
    width = max(len(row) for row in rows)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])  # [b, width]
    position_ids = torch.arange(width - 1).expand(len(rows), width - 1)
    return padded[:, :-1], position_ids, padded[:, 1:]


def _share(
    rows: Mapping[int, Sequence[int]], tokens_per_batch: int, rank: int, size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """This rank's batches, numbers and rows; as many as every other rank's."""
    numbers = [number for number, row in rows.items() if len(row) > 1]
    lengths = [len(rows[number]) - 1 for number in numbers]
    batches = plan_batches(lengths, tokens_per_batch=tokens_per_batch)
    for start in range(0, len(batches), size):
        if start + rank < len(batches):
            mine = [numbers[index] for index in batches[start + rank]]
            yield mine, [rows[number] for number in mine]
        else:
            yield [], [_IDLE]
