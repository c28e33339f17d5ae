"""Checks that the metadata of a distributed checkpoint is consistent.

A pickle says which class a record is of, not what its fields hold. Here they are held against each
other. Then readers may rely on the sizes, and the chunks of a tensor cover all of its values.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron.trainer.io.bounded_read import is_plain_name

_LARGEST_SIZE = 1 << 48
_LARGEST_COUNT = 1 << 60
_MOST_AXES = 32

Chunk = tuple[str, tuple[int, ...]]
"""Name of a tensor, offset of one of its chunks."""


def metadata_problems(metadata: Any) -> Iterator[str]:
    """List the problems of unpickled metadata, a clause each; nothing if it is valid.

    Args:
        metadata: torch's `Metadata`, or megatron-core's own class of the same fields.
    """
    described = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if not isinstance(described, dict) or not isinstance(places, dict):
        yield f"it holds a {type(metadata).__name__}, not the metadata of a distributed checkpoint"
        return
    placed: set[Chunk] = set()
    for index, info in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(index.fqn, str):
            yield f"it places a {type(index).__name__}, which is no part of a tensor"
            continue
        yield from _place_problems(index.fqn, info)
        if _are_sizes(index.offset):
            placed.add((index.fqn, tuple(index.offset)))
    for key, record in described.items():
        if not isinstance(key, str):
            yield f"it names a tensor by a {type(key).__name__}"
        elif isinstance(record, TensorStorageMetadata):
            yield from _tensor_problems(key, record, placed)
            placed -= {(key, tuple(chunk.offsets)) for chunk in record.chunks}
        elif not isinstance(record, BytesStorageMetadata):
            yield f"it describes {key} by a {type(record).__name__}"
    for key, offset in placed:
        if isinstance(described.get(key), TensorStorageMetadata):
            yield f"it places a chunk of {key} at {_shown(offset)} that it does not describe"


def _place_problems(key: str, info: Any) -> Iterator[str]:
    """Check where a chunk of a tensor, or an object, is stored."""
    shard = getattr(info, "relative_path", None)
    if not isinstance(shard, str) or not is_plain_name(shard):
        yield (
            f"it points to the file {_shown(shard)}; a checkpoint's files lie in its own directory"
        )
    ends = (getattr(info, "offset", None), getattr(info, "length", None))
    if not _are_sizes(ends):
        yield f"it places {key} at the bytes {_shown(ends)} of {_shown(shard)}"
    encoding = getattr(info, "transform_descriptors", None)
    if encoding:
        yield (
            f"it stores {key} {_shown(encoding)}-encoded; only plain tensors can be read; save it"
            " again without such an extension"
        )


def _tensor_problems(key: str, record: TensorStorageMetadata, placed: set[Chunk]) -> Iterator[str]:
    """Check one tensor: its sizes, its type, and that its chunks fill it."""
    shape, dtype = record.size, getattr(record.properties, "dtype", None)
    if (
        not _are_sizes(shape)
        or math.prod(shape) > _LARGEST_COUNT
        or not isinstance(dtype, torch.dtype)
    ):
        yield f"it describes {key} as {_shown(dtype)} of the shape {_shown(shape)}"
        return
    if not isinstance(record.chunks, list):
        yield f"it describes {key} without chunks"
        return
    stored = 0
    for chunk in record.chunks:
        if not isinstance(chunk, ChunkStorageMetadata) or not _lies_within(chunk, shape):
            yield f"it has a chunk of {key} that does not lie within its shape, {tuple(shape)}"
            return
        stored += math.prod(chunk.sizes)
        if (key, tuple(chunk.offsets)) not in placed:
            yield f"it does not say where the chunk of {key} at {tuple(chunk.offsets)} lies"
    if stored != math.prod(shape):
        yield f"its chunks hold {stored} of the {math.prod(shape)} values of {key}"


def _lies_within(chunk: ChunkStorageMetadata, shape: torch.Size) -> bool:
    offsets, sizes = chunk.offsets, chunk.sizes
    return (
        _are_sizes(offsets)
        and _are_sizes(sizes)
        and len(offsets) == len(sizes) == len(shape)
        and all(a + b <= end for a, b, end in zip(offsets, sizes, shape, strict=True))
    )


def _are_sizes(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Return whether these are integers from 0 on that no arithmetic can overflow."""
    return (
        isinstance(value, tuple)
        and len(value) <= _MOST_AXES
        and all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in value)
    )


def _shown(value: Any) -> str:
    """Format a value for a message, at bounded length even for deeply nested tuples."""
    if isinstance(value, tuple | list) and len(value) <= _MOST_AXES:
        return f"({', '.join(_shown_leaf(item) for item in value)})"
    return _shown_leaf(value)


def _shown_leaf(value: Any) -> str:
    is_short = isinstance(value, str) and len(value) <= 200
    is_small = isinstance(value, int) and abs(value) < 1 << 64
    return repr(value) if is_short or is_small else f"a {type(value).__name__}"
