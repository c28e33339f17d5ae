"""Compute log-probabilities of given tokens, in batches of similar lengths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_DUMMY_ROW = (0, 0)
"""A row for ranks without work, which keeps collectives matched."""


class Scorer(Protocol):
    """Computes log-probabilities and logits, on one rank or many."""

    @property
    def is_output_rank(self) -> bool:
        """Return whether this rank returns the results of the ranks that share a batch."""
        ...

    def log_probs(self, tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor | None:
        """Return log-probabilities [b, n] of `labels` [b, n], or None on a rank without logits."""
        ...

    def logits(self, tokens: Tensor, position_ids: Tensor) -> Tensor | None:
        """Return logits [b, n, v], or None on a rank without logits."""
        ...


class PickedScorer(Protocol):
    """Computes log-probabilities after some positions only."""

    @property
    def is_output_rank(self) -> bool:
        """Return whether this rank returns the results of the ranks that share a batch."""
        ...

    def picked_log_probs(
        self, tokens: Tensor, position_ids: Tensor, picked: tuple[Tensor, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return log-probabilities of `labels` [m] after picked positions of [b, n].

        And whether each is the likeliest token; None on a rank without logits.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Holds tokens whose last ones are scored given those before them."""

    ids: tuple[int, ...]
    """Context and continuation together, at least two."""
    count: int
    """How many at the end are the continuation; at least one, and not all."""


def plan_batches(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Group rows of similar lengths into batches, longest first.

    Args:
        lengths: tokens of each row that the model computes.
        tokens_per_batch: maximum tokens of a batch, padding included; a longer row gets its own
            batch.

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
        rows: token ids by row number, the same on every rank.
        tokens_per_batch: see `plan_batches`.
        data_parallel_rank: selects this rank's share of the batches.
        data_parallel_size: number of shares.

    Returns:
        On an output rank, the log-probability of every token from the second on, for each row of
        its share by number. Elsewhere nothing.
    """
    scores: dict[int, list[float]] = {}
    batches = _local_batches(rows, tokens_per_batch, data_parallel_rank, data_parallel_size)
    for numbers, batch in batches:
        tokens, position_ids, labels = pad(batch)
        found = model.log_probs(tokens, position_ids, labels)
        if found is not None and model.is_output_rank:
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
    """Compute logits of rows; a collective call with the arguments of `score`.

    Returns:
        On an output rank, fp32 logits [tokens - 1, v] on the CPU after every token but the last,
        for each row of its share by number. Elsewhere nothing.
    """
    logits: dict[int, Tensor] = {}
    batches = _local_batches(rows, tokens_per_batch, data_parallel_rank, data_parallel_size)
    for numbers, batch in batches:
        tokens, position_ids, _ = pad(batch)
        found = model.logits(tokens, position_ids)
        if found is not None and model.is_output_rank:
            for number, row, values in zip(numbers, batch, found, strict=False):
                logits[number] = values[: len(row) - 1].to("cpu", torch.float32)
    return logits


def score_continuations(
    model: PickedScorer,
    requests: Mapping[int, Continuation],
    *,
    tokens_per_batch: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> dict[int, tuple[float, bool]]:
    """Score continuations given their contexts; a collective call with the arguments of `score`.

    Requests that differ in their last token alone, such as the letters of a multiple-choice
    question, share a row of the forward pass. Logits are computed after the scored tokens only.

    Returns:
        On an output rank, the sum of log-probabilities of each continuation of its share, and
        whether it is what greedy decoding gives, by number. Elsewhere nothing.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, request in requests.items():
        sharing.setdefault(request.ids[:-1], []).append(number)
    groups = list(sharing.values())
    # A row of the pass ends with a label, which it does not compute; any of its group's will do.
    rows = {index: requests[group[0]].ids for index, group in enumerate(groups)}
    found: dict[int, tuple[float, bool]] = {}
    for indices, batch in _local_batches(
        rows, tokens_per_batch, data_parallel_rank, data_parallel_size
    ):
        tokens, position_ids, _ = pad(batch)
        places, labels, owners = [(0, 0)], [0], [-1]  # of a dummy row, dropped below
        for row, index in enumerate(indices):
            for number in groups[index]:
                ids, count = requests[number].ids, requests[number].count
                places += [(row, len(ids) - 1 - back) for back in range(count, 0, -1)]
                labels += ids[-count:]
                owners += [number] * count
        row_of, column_of = torch.tensor(places).unbind(1)
        output = model.picked_log_probs(
            tokens, position_ids, (row_of, column_of), torch.tensor(labels)
        )
        if output is not None and model.is_output_rank:
            log_probs, is_likeliest = (each.tolist() for each in output)
            for owner, value, is_greedy in zip(owners, log_probs, is_likeliest, strict=True):
                total, all_greedy = found.get(owner, (0.0, True))
                found[owner] = (total + value, all_greedy and is_greedy)
    found.pop(-1, None)
    return found


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, positions and labels [b, longest row - 1], padded on the right.

    Args:
        rows: b lists of at least two ids.
    """
    width = max(len(row) for row in rows)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])  # [b, width]
    position_ids = torch.arange(width - 1).expand(len(rows), width - 1)
    return padded[:, :-1], position_ids, padded[:, 1:]


def _local_batches(
    rows: Mapping[int, Sequence[int]], tokens_per_batch: int, rank: int, size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Yield row numbers and rows of this rank's batches; every rank yields as many."""
    numbers = [number for number, row in rows.items() if len(row) > 1]
    lengths = [len(rows[number]) - 1 for number in numbers]
    batches = plan_batches(lengths, tokens_per_batch=tokens_per_batch)
    for start in range(0, len(batches), size):
        if start + rank < len(batches):
            mine = [numbers[index] for index in batches[start + rank]]
            yield mine, [rows[number] for number in mine]
        else:
            yield [], [_DUMMY_ROW]
