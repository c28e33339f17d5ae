"""Splits sequences over context parallel ranks, and causal attention with them.

A sequence of s positions is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r, one
after the other: the early chunk's queries attend to few keys and the late one's to many, so every
rank has the same work. This is megatron-core's balanced split. Keys and values are gathered from
the group as they are, without repeating grouped heads; their gradients are summed back by a
reduce-scatter.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def chunk_order(size: int) -> list[int]:
    """Lists chunk numbers in the order in which `size` ranks hold them, rank after rank."""
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def gather_sequence(local: Tensor, group: Any) -> Tensor:
    """Gathers every rank's positions, in their order in the sequence.

    Differentiable; the gradient of a position is summed over the ranks that attended to it.

    Args:
        local: [s / cp, ...] this rank's two chunks.
        group: context parallel ranks.

    Returns:
        [s, ...].
    """
    size = group.size()
    if size == 1:
        return local
    gathered = gather_from_sequence_parallel_region(
        local.contiguous(), tensor_parallel_output_grad=True, group=group
    )  # [s, ...], rank after rank
    order = chunk_order(size)
    chunks = gathered.chunk(2 * size)
    return torch.cat([chunks[order.index(chunk)] for chunk in range(2 * size)])


def own_positions(whole: Tensor, group: Any) -> Tensor:
    """Takes this rank's two chunks [s / cp, ...] of a sequence [s, ...]."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size)
    return torch.cat([chunks[chunk] for chunk in chunk_order(size)[2 * rank : 2 * rank + 2]])


def gather_key_value(key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Gathers keys and values as `gather_sequence` does, both in one collective call."""
    both = gather_sequence(torch.cat((key, value), dim=-1), group)  # [s, b, ng, 2 hn]
    gathered_key, gathered_value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
    return gathered_key, gathered_value


def query_parts(size: int, rank: int, length: int) -> Iterator[tuple[slice, int]]:
    """Yields this rank's queries in two parts, each with the number of keys it may attend to.

    Args:
        size: context parallel ranks (cp).
        rank: this one.
        length: positions on this rank, s / cp, even.

    Yields:
        Local positions, and how many leading positions of the sequence their last one sees.
    """
    half = length // 2
    for part, chunk in enumerate((rank, 2 * size - 1 - rank)):
        yield slice(part * half, (part + 1) * half), (chunk + 1) * half
