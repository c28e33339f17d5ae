"""Encodes texts word by word, and each word once, where a tokenizer lets its texts be cut."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.encoding import Ids

_LONGEST_KEPT = 64
_MOST_KEPT = 1 << 18
_LEAST_REPEATS, _WHOLE_CALLS = 2, 8
_SMALL_VOCABULARY = 1 << 16


class WordCache:
    """Keeps the ids of words that were seen.

    Args:
        pattern: Finds the stretches into which a text may be cut; together they are all of it.
        encode_words: Gives the ids of each of several stretches.
        encode_text: Gives the ids of a whole text.
        prefix: What belongs before each text that is not empty.
        vocab_size: Every id is below it.
    """

    def __init__(
        self,
        pattern: str,
        *,
        encode_words: Callable[[Sequence[str]], Iterable[Ids]],
        encode_text: Callable[[str], Ids],
        prefix: str = "",
        vocab_size: int,
    ) -> None:
        self.cut: Callable[[str], list[str]] = re.compile(pattern).findall
        self._encode_words = encode_words
        self._encode_text = encode_text
        self._prefix = prefix
        is_small = vocab_size <= _SMALL_VOCABULARY
        self._dtype: npt.DTypeLike = np.uint16 if is_small else np.int32
        self._known: dict[str, bytes] = {}
        self._whole_calls = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        texts = [self._prefix + text if text else text for text in texts]
        if self._whole_calls:
            self._whole_calls -= 1
            return [self._encode_text(text) for text in texts]
        known = self._known
        cut = [self.cut(text) for text in texts]
        found = [list(map(known.get, words)) for words in cut]
        new = list(
            {
                word
                for words, ids in zip(cut, found, strict=True)
                if None in ids
                for word, its in zip(words, ids, strict=True)
                if its is None
            }
        )
        for word, its in zip(new, self._encode_words(new), strict=True):
            known[word] = its.astype(self._dtype).tobytes()
        # Where words hardly come again, as in encoded bytes, whole texts are encoded for a while.
        if sum(map(len, new)) * _LEAST_REPEATS > sum(map(len, texts)):
            self._whole_calls = _WHOLE_CALLS
        whole = [
            b"".join(map(known.__getitem__, words) if None in ids else ids)  # type: ignore[arg-type]
            for words, ids in zip(cut, found, strict=True)
        ]
        self._forget(new)
        return [np.frombuffer(each, self._dtype) for each in whole]

    def _forget(self, new: Iterable[str]) -> None:
        """Keep memory bounded."""
        if len(self._known) > _MOST_KEPT:
            self._known.clear()
            return
        for word in new:
            if len(word) > _LONGEST_KEPT:
                del self._known[word]
