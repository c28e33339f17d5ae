"""A native tensor, cut into blocks, and the parts of Hugging Face tensors each block is made of.

Both sides are walked a block at a time, so a converter holds one expert or one dense matrix, never
a model. Nothing here reads or writes files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["per-expert", "fused"]
"""How a Hugging Face checkpoint stores experts: a tensor for each, or one for all of a layer."""

ToNative = Callable[[Sequence[Tensor]], Tensor]
ToHF = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Consecutive rows of one Hugging Face tensor: consecutive bytes on disk."""

    name: str
    """The tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int = 0
    """First row taken: an index of the leading axis."""
    count: int
    """Rows taken."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what is taken; it keeps every axis of the tensor."""
        return (self.count, *self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One block of one native tensor and the Hugging Face tensors it is made of.

    `to_native` takes tensors of the sources' `part_shape`, in their order, and returns one of the
    `block` shape; `to_hf` is its exact inverse. Both only move numbers: any dtype goes through
    unchanged, and the result may be a view of what was given. A piece without sources is padding of
    the vocabulary: zeros (float32; cast to the checkpoint's dtype) that no Hugging Face tensor has.
    """

    key: str
    """Global name of the native tensor in a checkpoint."""
    shape: tuple[int, ...]
    """Of the whole native tensor, the stacked axes included; (L, e, 2, f, h), for example."""
    offset: tuple[int, ...]
    """Where the block begins in it."""
    block: tuple[int, ...]
    """Shape of the block; as many axes as `shape`."""
    sources: tuple[Slice, ...]
    """What it is made of."""
    to_native: ToNative
    """Sources -> block."""
    to_hf: ToHF
    """Block -> sources."""


def whole(name: str, *shape: int) -> Slice:
    """All of a tensor."""
    return Slice(name=name, shape=shape, count=shape[0])


def one_row(name: str, index: int, *shape: int) -> Slice:
    """Row `index` of a tensor of `shape`: one expert of a stack."""
    return Slice(name=name, shape=shape, start=index, count=1)


def same_numbers(
    key: str,
    source: Slice,
    *,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    block: tuple[int, ...],
) -> Piece:
    """A block that holds its source's numbers in the source's order."""
    return Piece(
        key=key,
        shape=shape,
        offset=offset,
        block=block,
        sources=(source,),
        to_native=partial(_reshape_only, shape=block),
        to_hf=partial(_as_list, shape=source.part_shape),
    )


def zeros(key: str, *, shape: tuple[int, ...], offset: tuple[int, ...]) -> Piece:
    """The rows from `offset` to the end, which no Hugging Face tensor has."""
    block = tuple(size - start for size, start in zip(shape, offset, strict=True))
    return Piece(
        key=key,
        shape=shape,
        offset=offset,
        block=block,
        sources=(),
        to_native=partial(_zeros, shape=block),
        to_hf=_nothing,
    )


def _reshape_only(sources: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    (source,) = sources
    return source.reshape(shape)


def _as_list(block: Tensor, *, shape: tuple[int, ...]) -> list[Tensor]:
    return [block.reshape(shape)]


def _zeros(sources: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    if sources:
        raise ValueError(f"padding has no sources, but was given {len(sources)} tensors")
    return torch.zeros(shape)


def _nothing(block: Tensor) -> list[Tensor]:
    return []
