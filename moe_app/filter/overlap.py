"""Finds documents that hold n-grams of evaluation texts.

A word is a longest run of letters, digits and underscores in the case-folded text, so that neither
case, punctuation nor line breaks hide a copy. An evaluation text shorter than the n-gram is looked
for as a whole, if it has enough words to mean anything.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import ConfigError

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MOST_CACHED_WORDS = 1 << 20

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class OverlapRule:
    """Says which overlap is too much; 13 words are GPT-3's (arXiv 2005.14165, appendix C)."""

    ngram: int = 13
    """Words that must agree in a row."""
    min_words: int = 8
    """Fewest words of an evaluation text that is looked for; also GPT-3's."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.ngram:
            raise ConfigError(
                f"min_words ({self.min_words}) must be at least 1 and at most ngram ({self.ngram})"
            )


class WordHasher:
    """Hashes words to 64 bits, the same in every process; remembers frequent ones."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def hash(self, text: str) -> Hashes:
        """Return [w] hashes of a text's words, in order."""
        words = _WORD.findall(text.casefold())
        if len(self._known) > _MOST_CACHED_WORDS:
            self._known.clear()
        known = self._known
        for word in set(words) - known.keys():
            digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
        return np.fromiter((known[word] for word in words), np.uint64, len(words))


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """Return [w - length + 1] hashes of all n-grams of [w] words; empty for fewer words."""
    count = len(words) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes ^ (hashes >> np.uint64(29))


@dataclass(frozen=True)
class OverlapIndex:
    """Holds the n-grams of evaluation texts, by length."""

    lengths: npt.NDArray[np.int64]
    """[l] lengths of n-grams that occur."""
    starts: npt.NDArray[np.int64]
    """[l + 1] where each length's n-grams start."""
    hashes: Hashes
    """[n] n-grams, sorted within their length; once for each evaluation text that holds one."""
    items: npt.NDArray[np.int64]
    """[n] index of the evaluation text of each."""

    def match(self, words: Hashes) -> list[tuple[int, int, int]]:
        """Return which evaluation texts a document overlaps, in order, each once.

        Args:
            words: [w] hashes of the document's words.

        Returns:
            Index of the evaluation text, of the first word they share, and how many words agree.
        """
        found: dict[int, tuple[int, int]] = {}
        for length, (start, stop) in zip(self.lengths, pairwise(self.starts), strict=True):
            known = self.hashes[start:stop]
            hashes = ngram_hashes(words, int(length))
            places = np.searchsorted(known, hashes)
            places[places == len(known)] = 0
            for position in np.flatnonzero(known[places] == hashes):
                stop_place = np.searchsorted(known, hashes[position], side="right")
                for item in self.items[start + places[position] : start + stop_place].tolist():
                    found.setdefault(item, (int(position), int(length)))
        return [(item, *place) for item, place in sorted(found.items())]


def build_index(texts: Iterable[str], rule: OverlapRule) -> tuple[OverlapIndex, list[int]]:
    """Return the index of evaluation texts, and which of them are too short to be in it."""
    hasher = WordHasher()
    by_length: dict[int, list[tuple[Hashes, int]]] = {}
    too_short = []
    for item, text in enumerate(texts):
        words = hasher.hash(text)
        if len(words) < rule.min_words:
            too_short.append(item)
            continue
        length = min(rule.ngram, len(words))
        by_length.setdefault(length, []).append((ngram_hashes(words, length), item))
    lengths = sorted(by_length)
    columns = [_sorted_ngrams(by_length[length]) for length in lengths]
    index = OverlapIndex(
        lengths=np.array(lengths, np.int64),
        starts=np.cumsum([0, *(len(hashes) for hashes, _ in columns)]),
        hashes=np.concatenate([np.empty(0, np.uint64), *(each for each, _ in columns)]),
        items=np.concatenate([np.empty(0, np.int64), *(each for _, each in columns)]),
    )
    return index, too_short


def _sorted_ngrams(found: Sequence[tuple[Hashes, int]]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Return n-grams in order, each once with every evaluation text that holds it."""
    distinct = [np.unique(each) for each, _ in found]
    items = np.repeat([item for _, item in found], [len(each) for each in distinct])
    hashes = np.concatenate(distinct)
    order = np.lexsort([items, hashes])
    return hashes[order], items[order]
