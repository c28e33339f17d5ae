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
from collections.abc import Iterable, Iterator, Sequence
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
from megatron.trainer.data.word_cache import WordCache

_SPACE = "\u2581"
_SEPARATORS = [chr(each) for each in (0x0A, *range(0x01, 0x09), *range(0x0E, 0x20))]
"""Characters that hardly any vocabulary has, so that they become their byte; line ends first."""
_GROUP_CHARACTERS = 4096


class _Words:
    """Encodes words with a model that puts no space before a text.

    Args:
        processor: The model.
        separator: A character that no piece has: its one byte is a token.
    """

    def __init__(self, processor: SentencePieceProcessor, separator: str) -> None:
        self._processor = processor
        self._separator = separator
        self._separator_id: int = processor.EncodeAsIds(separator)[0]

    def encode(self, words: Sequence[str]) -> Iterator[Ids]:
        """Yield the ids of each, many encoded as one text: a separator between two cuts it."""
        group: list[str] = []
        size = 0
        for word in words:
            if self._separator in word:
                yield from self._encode_group(group)
                yield self._processor.EncodeAsNumpy(word)
                group, size = [], 0
                continue
            group.append(word)
            size += len(word)
            if size > _GROUP_CHARACTERS:
                yield from self._encode_group(group)
                group, size = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, words: Sequence[str]) -> Iterator[Ids]:
        ids = self._processor.EncodeAsNumpy("".join(word + self._separator for word in words))
        start = 0
        for end in np.flatnonzero(ids == self._separator_id).tolist():
            yield ids[start:end]
            start = end + 1


def make_word_encoder(processor: SentencePieceProcessor) -> WordCache | None:
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
        WordCache,
        pattern,
        encode_words=_Words(bare, separator).encode,
        encode_text=bare.EncodeAsNumpy,
        prefix=" " if rules.adds_prefix else "",
        vocab_size=len(pieces),
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
    encoder: WordCache, processor: SentencePieceProcessor, pieces: Sequence[SentencePiecePiece]
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
