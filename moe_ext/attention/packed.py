"""Attends within the documents of packed sequences, each on its own, without a mask.

A mask that keeps documents apart has s x s entries, and scores are computed and thrown away
wherever it hides them. Here each document is a causal attention of its own length: nothing is
computed across a border, and the kernels are those of plain causal attention. On GPUs one kernel of
torch may do all documents at once.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from moe_ext.attention.scaled_dot_product import attend, sees_to_the_end
from moe_ext.layers.context_parallel import gather_key_value, query_parts

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_CAPABILITY = (8, 0)
_KERNEL_MAX_HEAD_SIZE = 256
_KERNEL_ERROR = 0.02
"""Of the largest value: 8 bits, in sums of up to 64 terms of order one."""
_KERNEL_OPTIONS = ("scale", "window_size", "enable_gqa")


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """Says where the documents of a micro-batch are, under megatron-core's name for it.

    Of megatron-core's fields `qkv_format` is sbhd: sequences stay rows of a batch, and cu_seqlens_q
    and cu_seqlens_kv [n + 1] int32, on the device, count through them row after row.
    """

    lengths: tuple[tuple[int, ...], ...]
    """Tokens of the documents of each row, of whole sequences."""


def pack_documents(
    cu_seqlens: Tensor, *, num_rows: int, length: int, device: torch.device
) -> PackedDocuments:
    """Return the documents of a micro-batch of `num_rows` sequences of `length` positions.

    Args:
        cu_seqlens: [n + 1] int32 in host memory, where each document begins, row after row, and at
            last num_rows * length. Every row begins with a document.
        num_rows: b.
        length: s of whole sequences.
        device: of the micro-batch.

    Raises:
        ValueError: the documents do not fill the rows.
    """
    if cu_seqlens.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, from which each layer would have to wait for"
            " it; leave it in host memory"
        )
    borders = cu_seqlens.tolist()
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for begin, end in pairwise(borders):
        if not 0 <= begin < end <= num_rows * length or begin // length != (end - 1) // length:
            raise ValueError(
                f"cu_seqlens has a document from {begin} to {end}, which is no part of one of"
                f" {num_rows} rows of {length} positions"
            )
        rows[begin // length].append(end - begin)
    if borders[:1] != [0] or borders[-1:] != [num_rows * length]:
        raise ValueError(
            f"cu_seqlens goes from {borders[:1]} to {borders[-1:]}, but must go from [0] to"
            f" [{num_rows * length}], {num_rows} rows of {length} positions"
        )
    on_device = cu_seqlens.to(device, non_blocking=True)
    longest = max(max(row) for row in rows)
    return PackedDocuments(
        qkv_format="sbhd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(tuple(row) for row in rows),
    )


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether one kernel of torch attends within all documents at once.

    It is FlashAttention's: of a GPU of compute capability 8.0 or above, in 16 bits. The options
    that it is called with came to torch after 2.10. It is taken if it computes on this device what
    one call a document does, which is tried once.
    """
    if device.type != "cuda" or dtype not in _KERNEL_DTYPES or head_size > _KERNEL_MAX_HEAD_SIZE:
        return False
    if torch.cuda.get_device_capability(device) < _KERNEL_CAPABILITY:
        return False
    options = inspect.signature(_kernel()).parameters
    return all(name in options for name in _KERNEL_OPTIONS) and kernel_agrees(
        device, dtype, head_size
    )


def kernel_agrees(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether torch's kernel gives outputs and gradients of one call a document.

    Args:
        device: where.
        dtype: of queries, keys and values.
        head_size: hn.
    """
    lengths = torch.tensor([0, 1, 24, 64, 128], dtype=torch.int32)
    packed = pack_documents(lengths, num_rows=2, length=64, device=device)
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = (
        torch.randn(64, 2, heads, head_size, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    inputs = [each.requires_grad_() for each in (query, key, value)]
    scale = head_size**-0.5
    with torch.enable_grad():
        expected = attend_one_by_one(query, key, value, packed, scale)
        wanted = [expected, *torch.autograd.grad(expected, inputs, upstream.flatten(2))]
        try:
            output = attend_at_once(query, key, value, packed, scale)
            found = [output, *torch.autograd.grad(output, inputs, upstream.flatten(2))]
        except (RuntimeError, TypeError, ValueError):
            return False
    return all(
        torch.allclose(one, other, rtol=0, atol=_KERNEL_ERROR * other.abs().max().item())
        for one, other in zip(found, wanted, strict=True)
    )


def way_of(device: torch.device, dtype: torch.dtype, head_size: int, context_parallel: int) -> str:
    """Describe how documents are attended to, for the log."""
    if context_parallel == 1 and has_kernel(device, dtype, head_size):
        return "one call of torch's varlen_attn for all documents"
    return "one call of causal attention a document"


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedDocuments, scale: float | None
) -> Tensor:
    """Attends within documents by torch's kernel; see `attend_one_by_one`."""
    length, rows = query.shape[:2]
    context = _kernel()(
        *(each.transpose(0, 1).flatten(0, 1) for each in (query, key, value)),  # [b * s, n, hn]
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[2] != key.shape[2],
    )  # [b * s, np, hn]
    by_row = context.unflatten(0, (rows, length))  # [b, s, np, hn]
    return by_row.transpose(0, 1).flatten(2).contiguous()  # [s, b, np * hn]


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedDocuments,
    scale: float | None,
    *,
    cp_group: Any = None,
) -> Tensor:
    """Attends within documents by one call of fused causal attention for each.

    Args:
        query: [s, b, np, hn], this context parallel rank's positions.
        key: [s, b, ng, hn] of the same positions.
        value: [s, b, ng, hn].
        packed: where documents are in whole sequences.
        scale: of scores; None means 1 / sqrt(hn).
        cp_group: context parallel ranks; None where the sequence is whole.

    Returns:
        [s, b, np * hn].
    """
    length = query.shape[0]
    parts = [(slice(0, length), length)]
    if cp_group is not None:
        key, value = gather_key_value(key, value, cp_group)
        parts = list(query_parts(cp_group.size(), cp_group.rank(), length))
    # `split` and not slices, whose gradients would be as long as the sequence, one for each.
    rows = zip(*(each.split(1, dim=1) for each in (query, key, value)), packed.lengths, strict=True)
    contexts = []
    for row_query, row_key, row_value, lengths in rows:
        keys, values = row_key.split(lengths), row_value.split(lengths)
        found = []
        for positions, end in parts:
            part = row_query[positions]
            pieces = list(_pieces(lengths, end - len(part), end))
            for piece, (document, _, seen) in zip(
                part.split([count for _, count, _ in pieces]), pieces, strict=True
            ):
                found.append(_attend(piece, keys[document][:seen], values[document][:seen], scale))
        contexts.append(torch.cat(found))  # [s, 1, np * hn]
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=1)


def _pieces(lengths: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields the documents of positions `first` to `stop` of a row.

    Yields:
        A document's number in the row, how many of the positions are in it, and how many of its
        tokens, from its first on, the last of these sees.
    """
    begin = 0
    for document, length in enumerate(lengths):
        here = min(begin + length, stop)
        count = here - max(begin, first)
        if count > 0:
            yield document, count, here - begin
        begin += length


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attends from the last [n, 1, np, hn] of a document to [m, 1, ng, hn]; [n, 1, np * hn]."""
    visible = None if len(query) == len(key) else sees_to_the_end(len(query), len(key))
    return attend(query, key, value, visible, scale, is_causal=visible is None)


def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
