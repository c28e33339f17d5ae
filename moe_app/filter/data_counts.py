"""Counts what a source of documents holds, one document at a time, in bounded memory."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

DIGEST_BYTES = 16
OTHER = "(other)"
NONE = "(none)"
_MOST_EXTENSIONS = 1000
_LONGEST_EXTENSION = 16
_PATH_KEYS = ("path", "max_stars_repo_path", "file_path")


@dataclass(kw_only=True)
class DataCounts:
    """Adds up the documents of a source."""

    name: str
    unit: str
    """What lengths are in: tokens, or bytes of text."""
    digests: BinaryIO | None
    """Gets 16 bytes for each document that is not empty; None where duplicates are not counted."""
    documents: int = 0
    empty: int = 0
    tokens: int | None = None
    text_bytes: int | None = None
    bad_lines: int = 0
    duplicates: int | None = None
    """Documents equal to an earlier one of the source."""
    shortest: int | None = None
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the bits of their length: key k counts lengths of 2^(k-1) to 2^k - 1."""
    languages: dict[str, list[int]] = field(default_factory=dict)
    """Documents and bytes by the extension of a document's path."""

    def add(self, content: bytes, length: int) -> None:
        """Count a document.

        Args:
            content: What is equal in equal documents.
            length: In `unit`.
        """
        self.documents += 1
        self.empty += not length
        self.lengths[length.bit_length()] += 1
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.longest = max(self.longest, length)
        if self.digests is not None and length:
            self.digests.write(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest())

    def add_language(self, document: Mapping[str, Any], num_bytes: int) -> None:
        """Count a document of text under the extension of its path, if it has one."""
        extension = extension_of(document)
        if extension is None:
            return
        if extension not in self.languages and len(self.languages) >= _MOST_EXTENSIONS:
            extension = OTHER
        found = self.languages.setdefault(extension, [0, 0])
        found[0] += 1
        found[1] += num_bytes

    def summary(self) -> dict[str, Any]:
        """Return the counts as JSON has them."""
        per_token = self.text_bytes / self.tokens if self.text_bytes and self.tokens else None
        total = (self.tokens if self.unit == "tokens" else self.text_bytes) or 0
        languages = sorted(self.languages.items(), key=lambda item: (-item[1][1], item[0]))
        return {
            "source": self.name,
            "documents": self.documents,
            "empty": self.empty,
            "bad_lines": self.bad_lines,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "bytes_per_token": per_token,
            "duplicates": self.duplicates,
            "length_unit": self.unit,
            "length_mean": total / self.documents if self.documents else None,
            "length_shortest": self.shortest,
            "length_longest": self.longest,
            "lengths": [
                {"from": (1 << bits) >> 1, "to": (1 << bits) - 1, "documents": count}
                for bits, count in sorted(self.lengths.items())
            ],
            "languages": [
                {"extension": name, "documents": count, "text_bytes": size}
                for name, (count, size) in languages
            ],
        }


def extension_of(document: Mapping[str, Any]) -> str | None:
    """Return the extension of the path that a document or its metadata has; None without path."""
    places = [document, document.get("metadata"), document.get("meta")]
    for place in places:
        if not isinstance(place, Mapping):
            continue
        for key in _PATH_KEYS:
            if isinstance(path := place.get(key), str):
                suffix = PurePosixPath(path).suffix.lower()
                return suffix if 1 < len(suffix) <= _LONGEST_EXTENSION else NONE
    return None


def count_repeated(digests: BinaryIO) -> int:
    """Return how many digests equal one before; takes the size of their file in memory."""
    count = digests.seek(0, os.SEEK_END) // DIGEST_BYTES
    digests.seek(0)
    values = np.empty(count, f"S{DIGEST_BYTES}")  # [n]
    digests.readinto(values.view(np.uint8))  # type: ignore[attr-defined]
    values.sort()
    return int((values[1:] == values[:-1]).sum())
