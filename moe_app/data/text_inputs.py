"""Looks at the inputs of preprocessing: which files they are, and how a shard cuts them."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.trainer.data.text_input import check_inputs, is_packed, is_pipe
from megatron.trainer.errors import ConfigError, DataError
from moe_app.data.sources import find_sources

_ENDS_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 16
_PACKED_WEIGHT = 4
"""About how many times its size a compressed file of text unpacks to."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """Describes what one path names."""

    path: str
    """As it is opened."""
    num_bytes: int | None
    """As it lies on disk; None for a pipe."""
    modified_ns: int | None
    sha256: str | None
    """Of its size and its first and last 64 KiB, which tell it from most other files."""
    is_plain: bool
    """Whether it may be read from any byte on: a file that is not compressed."""

    @property
    def weight(self) -> int:
        """Return about how many bytes of text it holds."""
        return (self.num_bytes or 0) * (1 if self.is_plain else _PACKED_WEIGHT)


@dataclass(frozen=True)
class Segment:
    """Names a stretch of one input."""

    source: int
    """The input's place among all."""
    start: int
    """Byte of its first line."""
    stop: int | None
    """Byte after its last line; None for an input that is read from its beginning to its end."""


def find_inputs(paths: Sequence[str]) -> list[Input]:
    """Look at all inputs, in order; those of a folder or pattern by their names.

    Raises:
        DataError: One is missing or cannot be read, leads out of its folder, or is a pipe that is
            named twice.
    """
    check_inputs(paths)
    return [_look_at(each) for path in paths for each in _expand(path)]


def _expand(path: str) -> list[str]:
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    if not (os.path.isdir(path) or is_pattern):
        return [path]
    return [each.path for each in find_sources([path])]


def _look_at(path: str) -> Input:
    if is_pipe(path):
        return Input(path=path, num_bytes=None, modified_ns=None, sha256=None, is_plain=False)
    if not os.path.isfile(path):
        raise DataError(
            f"{path} does not exist or is not a file; an input must be a JSON Lines file;"
            " check the path"
        )
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(_ENDS_BYTES)
            file.seek(max(len(start), status.st_size - _ENDS_BYTES))
            digest = hashlib.sha256(f"{status.st_size}\n".encode() + start + file.read(_ENDS_BYTES))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check its permissions"
        ) from error
    is_plain = not is_packed(start) and not path.endswith((".gz", ".zst"))
    return Input(
        path=path,
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        sha256=digest.hexdigest(),
        is_plain=is_plain,
    )


def cut_shard(inputs: Sequence[Input], *, index: int, count: int) -> list[Segment]:
    """Return what one of several shards reads: stretches of about the same size, cut at lines.

    All shards together, one after the other, are all lines of all inputs in order. A compressed
    file is not cut.

    Raises:
        ConfigError: There is a pipe, which only one process can read.
    """
    if count == 1:
        return [
            Segment(place, 0, each.num_bytes if each.is_plain else None)
            for place, each in enumerate(inputs)
            if each.num_bytes or not each.is_plain
        ]
    pipe = next((each.path for each in inputs if each.num_bytes is None), None)
    if pipe is not None:
        raise ConfigError(
            f"--num-shards {count}: --input {pipe} is a pipe, which only one process can read; name"
            " files"
        )
    return list(_cut(inputs, index, count))


def _cut(inputs: Sequence[Input], index: int, count: int) -> Iterator[Segment]:
    total = sum(each.weight for each in inputs)
    low, high = total * index // count, total * (index + 1) // count
    before = 0
    for source, each in enumerate(inputs):
        if each.is_plain and each.num_bytes:
            start, stop = (
                line_start(each.path, min(max(bound - before, 0), each.num_bytes))
                for bound in (low, high)
            )
            if start < stop:
                yield Segment(source, start, stop)
        elif not each.is_plain and low <= before + each.weight // 2 < high:
            yield Segment(source, 0, None)
        before += each.weight


def line_start(path: str, at: int) -> int:
    """Return where the first line begins that begins at or after a byte; the end for none."""
    if at == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(at - 1)
        while block := file.read(_BLOCK_BYTES):
            found = block.find(b"\n")
            if found >= 0:
                return file.tell() - len(block) + found + 1
        return file.tell()


def count_lines(path: str, stop: int) -> int:
    """Return how many lines a plain file has before a byte."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 20))):
            count += block.count(b"\n")
            stop -= len(block)
    return count
