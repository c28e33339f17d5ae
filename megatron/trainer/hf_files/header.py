"""Parses and builds the header of a safetensors file: names, types, shapes, offsets.

A file is 8 bytes with the header's length (little-endian), the header (JSON), and the tensors'
bytes contiguously. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

import torch

from megatron.trainer.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; the header of a model with a million tensors has about this size."""

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""The types that weights come in, by their names in a header."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Describes a tensor's type, shape and offset in its file."""

    dtype: torch.dtype
    """Of the numbers on disk."""
    shape: tuple[int, ...]
    """Row-major."""
    begin: int
    """Offset of its first byte from the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        """Return its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, name: str) -> dict[str, TensorEntry]:
    """Read and validate the header of an open file.

    Everything is checked against the size of the file before anything of that size is allocated.

    Args:
        file: open at any position; is left anywhere.
        name: how errors call it.

    Returns:
        Its tensors by name, in the order of their bytes.

    Raises:
        CheckpointError: this is not a complete safetensors file of supported types.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise CheckpointError(f"{name} has {size} bytes, too few for a safetensors file; {_AGAIN}")
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name} announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are"
            f" possible, so it is damaged or no safetensors file; {_AGAIN}"
        )
    start = _LENGTH.size + length
    if start > size:
        raise CheckpointError(
            f"{name} announces a header of {length} bytes, but has only {size} in all; {_AGAIN}"
        )
    entries = {
        tensor: _entry(tensor, value, start, name)
        for tensor, value in _parse(file.read(length), name).items()
        if tensor != _METADATA
    }
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)))
    _check_contiguous(ordered, start, size, name)
    return ordered


def build_header(tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Build the bytes before the data of a file that holds `tensors` of one type, in this order.

    Padded with spaces, so that the data begins at a multiple of 8 bytes.
    """
    (type_name,) = (text for text, known in DTYPES.items() if known is dtype)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    begin = 0
    for tensor, shape in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": type_name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


_AGAIN = "download it again"


def _parse(text: bytes, name: str) -> dict[str, Any]:
    """Parse the header's JSON object; a duplicate name is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {name} is not JSON: {error}; it is damaged or no safetensors file;"
            f" {_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"the header of {name} is not a JSON object of tensors; it is damaged; {_AGAIN}"
        )
    return header


def _entry(tensor: str, value: Any, start: int, name: str) -> TensorEntry:
    """Parse one tensor of the header; `start` is the offset of the data."""
    told: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (told.get(key, None) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets, count=2):
        raise CheckpointError(
            f"{name} describes tensor {tensor!r} as {str(value)[:80]}; it must have dtype, shape"
            f" and two data_offsets; {_AGAIN}"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {tensor} in {name} is {dtype}; weights must be {', '.join(DTYPES)}; convert"
            " it with transformers first: load the model with dtype=torch.bfloat16 and"
            " save_pretrained"
        )
    begin, end = offsets
    entry = TensorEntry(dtype=DTYPES[dtype], shape=tuple(shape), begin=start + begin)
    if end - begin != entry.num_bytes:
        raise CheckpointError(
            f"tensor {tensor} in {name} has {end - begin} bytes, but {dtype} {list(shape)} are"
            f" {entry.num_bytes}; the header is damaged; {_AGAIN}"
        )
    return entry


def _is_sizes(value: Any, count: int | None = None) -> TypeGuard[list[int]]:
    """Return whether this is a list of non-negative integers below 2^48."""
    return (
        isinstance(value, list)
        and (len(value) <= 16 if count is None else len(value) == count)
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
    )


def _check_contiguous(entries: Mapping[str, TensorEntry], start: int, size: int, name: str) -> None:
    """Check that the tensors are contiguous and fill the file."""
    position, before = start, "the header"
    for tensor, entry in entries.items():
        if entry.begin != position:
            what = "overlap" if entry.begin < position else "leave a hole"
            raise CheckpointError(
                f"{before} and tensor {tensor} in {name} {what}: one ends at byte {position}, the"
                f" other begins at {entry.begin}; tensors must lie end to end; {_AGAIN}"
            )
        position, before = entry.begin + entry.num_bytes, f"tensor {tensor}"
    if position != size:
        what = "cut short" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{name} is {what}: it has {size} bytes, its header describes {position}; {_AGAIN}"
        )
