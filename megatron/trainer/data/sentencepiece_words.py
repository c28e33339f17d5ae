"""Encodes texts word by word, and each word once, where whole texts have the same ids.

A byte-pair model joins two neighbouring symbols only if a piece of its vocabulary is the two
together, and whichever pair goes first is decided by the pieces' scores, among equal ones by
their order in the text. So nothing is ever joined across a place whose two characters no piece
has side by side, and what is on one side has no effect on the other: there a text may be cut.
Scores of other models' paths are sums over a whole text, whose rounding a cut would change.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron.trainer.data.encoding import Ids
from megatron.trainer.data.sentencepiece_pieces import (
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePiecePiece,
    read_pieces,
    read_rules,
    without_prefix,
)

_SPACE = "\u2581"
_SEPARATORS = [chr(each) for each in (0x0A, *range(0x01, 0x09), *range(0x0E, 0x20))]
"""Characters that hardly any vocabulary has, so that they become their byte; line ends first."""
_LONGEST_KEPT = 64
_MOST_KEPT = 1 << 18
_GROUP_CHARACTERS = 4096
_SMALL_VOCABULARY = 1 << 16
_LEAST_REPEATS, _WHOLE_CALLS = 2, 8


class WordEncoder:
    """Encodes texts with a SentencePiece model, and keeps the ids of words that it has seen.

    Args:
        processor: The model, made to put no space before a text.
        pattern: Finds the stretches into which a text may be cut; together they are all of it.
        separator: A character that no piece has: its one byte is a token.
        adds_prefix: Whether a space belongs before each text.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        pattern: str,
        *,
        separator: str,
        adds_prefix: bool,
    ) -> None:
        self._processor = processor
        self._cut: Callable[[str], list[str]] = re.compile(pattern).findall
        self._separator = separator
        self._separator_id: int = processor.EncodeAsIds(separator)[0]
        self._prefix = " " if adds_prefix else ""
        is_small = processor.GetPieceSize() <= _SMALL_VOCABULARY
        self._dtype = np.dtype(np.uint16 if is_small else np.int32)
        self._known: dict[str, bytes] = {}
        self._whole_calls = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        if self._whole_calls:
            self._whole_calls -= 1
            return [
                self._processor.EncodeAsNumpy(self._prefix + text if text else "") for text in texts
            ]
        known = self._known
        cut = [self._cut(self._prefix + text if text else text) for text in texts]
        found = [list(map(known.get, words)) for words in cut]
        new = {
            word
            for words, ids in zip(cut, found, strict=True)
            if None in ids
            for word, its in zip(words, ids, strict=True)
            if its is None
        }
        if new:
            self._learn(new)
        # Where words hardly come again, as in encoded bytes, whole texts are encoded for a while.
        if sum(map(len, new)) * _LEAST_REPEATS > sum(map(len, texts)):
            self._whole_calls = _WHOLE_CALLS
        whole = [
            b"".join(map(known.__getitem__, words) if None in ids else ids)  # type: ignore[arg-type]
            for words, ids in zip(cut, found, strict=True)
        ]
        self._forget(new)
        return [np.frombuffer(each, self._dtype) for each in whole]

    def _learn(self, new: Iterable[str]) -> None:
        """Encode words, many in one text: a separator between two of them cuts it."""
        group: list[str] = []
        size = 0
        for word in new:
            if self._separator in word:
                self._known[word] = self._bytes(self._processor.EncodeAsNumpy(word))
                continue
            group.append(word)
            size += len(word)
            if size > _GROUP_CHARACTERS:
                self._learn_group(group)
                group, size = [], 0
        self._learn_group(group)

    def _learn_group(self, words: Sequence[str]) -> None:
        ids = self._processor.EncodeAsNumpy("".join(word + self._separator for word in words))
        encoded, width, start = self._bytes(ids), self._dtype.itemsize, 0
        ends = np.flatnonzero(ids == self._separator_id).tolist()
        for word, end in zip(words, ends, strict=True):
            self._known[word] = encoded[start * width : end * width]
            start = end + 1

    def _bytes(self, ids: Ids) -> bytes:
        return ids.astype(self._dtype).tobytes()

    def _forget(self, new: Iterable[str]) -> None:
        """Keep memory bounded."""
        if len(self._known) > _MOST_KEPT:
            self._known.clear()
            return
        for word in new:
            if len(word) > _LONGEST_KEPT:
                del self._known[word]


def make_word_encoder(processor: SentencePieceProcessor) -> WordEncoder | None:
    """Return an encoder by words that gives what a model gives; None where it cannot be known to.

    Args:
        processor: The model.
    """
    model: bytes = processor.serialized_model_proto()
    rules, pieces = read_rules(model), read_pieces(model)
    if not (rules.is_byte_pair and rules.has_byte_fallback and rules.keeps_text):
        return None
    kinds = {piece.kind for piece in pieces}
    words = [piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)]
    characters = {character for word in words for character in word}
    separator = next((each for each in _SEPARATORS if each not in characters), None)
    pattern = _pattern(words, has_lines=separator == _SEPARATORS[0])
    # How an unused piece is taken apart depends on the rest of the text.
    if UNUSED in kinds or " " in characters or separator is None or pattern is None:
        return None
    bare = processor
    if rules.adds_prefix:
        bare = SentencePieceProcessor()
        bare.LoadFromSerializedProto(without_prefix(model))
    if len(bare.EncodeAsIds(separator)) != 1:
        return None
    made = functools.partial(
        WordEncoder, bare, pattern, separator=separator, adds_prefix=rules.adds_prefix
    )
    return made() if _agree(made(), processor, pieces) else None


def _pattern(words: Sequence[str], *, has_lines: bool) -> str | None:
    """Return a pattern of the stretches that no piece reaches beyond; None where it has none.

    Args:
        words: The pieces that texts can become.
        has_lines: Whether a line end is in none of them.
    """
    pairs = {pair for word in words for pair in pairwise(word)}
    if any(after == _SPACE != before for before, after in pairs):
        return None
    joined = {pair for pair in pairs if pair[0] != _SPACE}
    marks = _marks({character for word in words for character in word}, joined)
    is_single = not any(each in string.digits for pair in joined for each in pair)
    lines, digits = "\n" if has_lines else "", string.digits if is_single else ""
    marked = re.escape("".join(sorted(marks)))
    parts = [f"[^ {_SPACE}{lines}{digits}{marked}]+"]
    parts += [f"[{marked}]+"] if marked else []
    parts += [f"[{digits}]{{1,3}}"] if digits else []
    whole = f"[ {_SPACE}]*(?:{'|'.join(parts)})|[ {_SPACE}]+"
    return whole + ("|\n{1,8}" if has_lines else "")


def _marks(characters: Iterable[str], joined: Iterable[tuple[str, str]]) -> set[str]:
    """Return punctuation that no piece has beside anything but such punctuation."""
    marks = {each for each in characters if unicodedata.category(each)[0] in "PS"} - {_SPACE}
    marks |= set(string.punctuation)
    while beside := {
        each
        for pair in joined
        if len(marks.intersection(pair)) == 1 and pair[0] != pair[1]
        for each in pair
        if each in marks
    }:
        marks -= beside
    return marks


def _agree(
    encoder: WordEncoder, processor: SentencePieceProcessor, pieces: Sequence[SentencePiecePiece]
) -> bool:
    """Return whether texts made to try it have the same ids by words as whole."""
    step = max(1, len(pieces) // 400)
    some = [piece.text.replace(_SPACE, " ") for piece in pieces[::step]]
    odd = [
        "",
        " ",
        "   ",
        "\n",
        "\n\n \n",
        "\r\n\t",
        _SPACE,
        f"a{_SPACE} b",
        "\0",
        "e\u0301 é",
        "🙂日本",
    ]
    odd += ["x = [1, 23,  456]  # a_b\n\tif  (x):\n", "don't -- stop... \u201cnow\u201d\u00a0!"]
    texts = [*odd, "".join(some), " ".join(some), "".join(reversed(some)), "".join(odd * 3)]
    return all(
        np.array_equal(ids, processor.EncodeAsNumpy(text))
        for text, ids in zip(texts, encoder.encode(texts), strict=True)
    )
