"""Describe a native tensor as blocks, and the parts of Hugging Face tensors that make up each.

Both sides are processed a block at a time, so a converter holds one expert or one dense matrix,
never a model. Nothing here reads or writes files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

ExpertLayout = Literal["per-expert", "fused", "dense"]
"""How a Hugging Face checkpoint stores experts: a tensor for each, or one for all of a layer; dense
where it has none."""

ToNative = Callable[[Sequence[Tensor]], Tensor]
ToHF = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Selects consecutive rows of one Hugging Face tensor: consecutive bytes on disk."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    start: int = 0
    """First row: an index of the leading axis."""
    count: int
    """Number of rows."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Return the shape of the selected rows, with every axis of the tensor."""
        return (self.count, *self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Maps one block of one native tensor to and from the Hugging Face tensors it is made of.

    `to_native` takes tensors of the sources' `part_shape`, in their order, and returns one of the
    `block` shape; `to_hf` is its exact inverse. Both only move values: any dtype passes through
    unchanged, and the result may be a view of the input. A piece without sources is vocabulary
    padding: zeros (float32; cast to the checkpoint's dtype) that no Hugging Face tensor has.
    """

    key: str
    """Global name of the native tensor in a checkpoint."""
    shape: tuple[int, ...]
    """Shape of the full native tensor, stacked axes included; (L, e, 2, f, h), for example."""
    offset: tuple[int, ...]
    """Start of the block in the native tensor."""
    block: tuple[int, ...]
    """Shape of the block; as many axes as `shape`."""
    sources: tuple[Slice, ...]
    """The Hugging Face rows it is made of."""
    to_native: ToNative
    """Sources -> block."""
    to_hf: ToHF
    """Block -> sources."""


def all_rows(name: str, *shape: int) -> Slice:
    """Select all rows of a tensor."""
    return Slice(name=name, shape=shape, count=shape[0])


def one_row(name: str, index: int, *shape: int) -> Slice:
    """Select row `index` of a tensor of `shape`: one expert of a stack."""
    return Slice(name=name, shape=shape, start=index, count=1)


def reshape_piece(
    key: str,
    source: Slice,
    *,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    block: tuple[int, ...],
) -> Piece:
    """Build a piece whose block holds the source's values in the source's order."""
    return Piece(
        key=key,
        shape=shape,
        offset=offset,
        block=block,
        sources=(source,),
        to_native=partial(_reshape, shape=block),
        to_hf=partial(_as_list, shape=source.part_shape),
    )


def padding_piece(key: str, *, shape: tuple[int, ...], offset: tuple[int, ...]) -> Piece:
    """Build the piece for rows from `offset` to the end, which no Hugging Face tensor has."""
    block = tuple(size - start for size, start in zip(shape, offset, strict=True))
    return Piece(
        key=key,
        shape=shape,
        offset=offset,
        block=block,
        sources=(),
        to_native=partial(_zero_block, shape=block),
        to_hf=_no_sources,
    )


def _reshape(sources: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    (source,) = sources
    return source.reshape(shape)


def _as_list(block: Tensor, *, shape: tuple[int, ...]) -> list[Tensor]:
    return [block.reshape(shape)]


def _zero_block(sources: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    if sources:
        raise ValueError(f"padding has no sources, but was given {len(sources)} tensors")
    return torch.zeros(shape)


def _no_sources(block: Tensor) -> list[Tensor]:
    return []
