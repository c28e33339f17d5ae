"""Finds which of equal or similar documents comes first, over all files.

Documents are named by file and line. The first of a group is kept, whatever the number of tasks.
"""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("line", "<u8"), ("part", "<u4")])
"""A text's hash and its place in a file: the line, and which paragraph of it."""
REMOVAL = np.dtype([("line", "<u8"), ("part", "<u4"), ("first_file", "<u4"), ("first_line", "<u8")])
"""What is removed from a file, and where it is first."""

Keys = npt.NDArray[np.void]
Removals = npt.NDArray[np.void]

_STRIDE = 1 << 22
_BREAK = re.compile(r"(\n(?:[^\S\n]*\n)+)")


def text_key(text: str) -> tuple[int, int]:
    """Return 128 bits of a text's BLAKE2b: equal for equal texts, and in practice for no others."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def split_paragraphs(text: str) -> list[str]:
    """Return paragraphs at even indices, and the blank lines after each at odd ones."""
    return _BREAK.split(text)


def remove_paragraphs(text: str, parts: Iterable[int]) -> str:
    """Return a text without some paragraphs and without the blank lines after them.

    Args:
        text: A document.
        parts: Numbers of paragraphs, counted from 0.
    """
    pieces = split_paragraphs(text)
    for part in parts:
        pieces[2 * part : 2 * part + 2] = [""] * len(pieces[2 * part : 2 * part + 2])
    return "".join(pieces)


def sort_keys(keys: Keys) -> Keys:
    """Return a file's keys ordered by hash, then by place."""
    return keys[np.lexsort([keys[name] for name in ("part", "line", "low", "high")])]


def keys_of_partition(keys: Keys, partition: int, partitions: int) -> Keys:
    """Return the slice of sorted keys whose hashes belong to one of equal partitions."""
    edges = [(each << 64) // partitions for each in (partition, partition + 1)]
    # The last edge is 2 ** 64, which no unsigned number of 64 bits holds.
    start = int(np.searchsorted(keys["high"], np.uint64(edges[0])))
    if partition + 1 == partitions:
        return keys[start:]
    return keys[start : int(np.searchsorted(keys["high"], np.uint64(edges[1])))]


def later_occurrences(files: list[Keys]) -> list[Removals]:
    """Return for each file what occurs earlier, in it or in a file before it."""
    keys = np.concatenate([np.empty(0, KEY), *files])
    numbers = np.repeat(np.arange(len(files), dtype=np.uint32), [len(each) for each in files])
    order = np.lexsort([keys["part"], keys["line"], numbers, keys["low"], keys["high"]])
    keys, numbers = keys[order], numbers[order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = (np.diff(keys["high"]) != 0) | (np.diff(keys["low"]) != 0)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    removals = np.empty(len(keys), REMOVAL)
    removals["line"], removals["part"] = keys["line"], keys["part"]
    removals["first_file"], removals["first_line"] = numbers[first], keys["line"][first]
    return [removals[~is_first & (numbers == file)] for file in range(len(files))]


def cluster_firsts(
    parts: Iterable[npt.NDArray[np.uint64]], count: int
) -> npt.NDArray[np.unsignedinteger]:
    """Join pairs of equal documents to clusters.

    Memory is 4 bytes for each of `count` documents, 8 from 2 ** 32 on, and what one part needs.

    Args:
        parts: [n, 2] documents each, as numbers in their order.
        count: How many documents there are.

    Returns:
        [count] the first document of each one's cluster.
    """
    kind = np.dtype(np.uint32 if count <= 1 << 32 else np.uint64)
    first: npt.NDArray[np.unsignedinteger] = np.arange(count, dtype=kind)
    for edges in parts:
        while len(edges):
            roots = _follow(first, edges)
            first[edges] = roots
            edges = roots[roots[:, 0] != roots[:, 1]]
            # Hang each cluster below the smallest one that it touches, then halve the paths.
            hung = edges.max(axis=1)
            np.minimum.at(first, hung, edges.min(axis=1))
            while not np.array_equal(first[hung], shorter := first[first[hung]]):
                first[hung] = shorter
    for start in range(0, count, _STRIDE):
        first[start : start + _STRIDE] = _follow(first, first[start : start + _STRIDE])
    return first


def _follow(
    first: npt.NDArray[np.unsignedinteger], documents: npt.NDArray[np.unsignedinteger]
) -> npt.NDArray[np.unsignedinteger]:
    """Return where the paths from some documents end."""
    found = first[documents]
    while not np.array_equal(found, further := first[found]):
        found = further
    return found
