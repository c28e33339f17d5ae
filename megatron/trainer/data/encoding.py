"""Encodes texts in which some control tokens are meant and others are only spelled."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]
"""First character, and the one after the last."""
Ids = npt.NDArray[np.integer]
"""Tokens of a document, of any integer type that holds them."""


@dataclass(frozen=True)
class Encoding:
    """Holds the tokens of a text and where each stands in it."""

    ids: list[int] = field(default_factory=list)
    """Of each token."""
    offsets: list[Span] = field(default_factory=list)
    """The characters of each token, in characters of the text; bytes of one share its span."""

    def extend(self, ids: Sequence[int], offsets: Sequence[Span], *, at: int) -> None:
        """Append the tokens of a piece of the text that begins at a character."""
        self.ids.extend(ids)
        self.offsets.extend((at + first, at + last) for first, last in offsets)


def overlaps(span: Span, others: Sequence[Span]) -> bool:
    """Return whether a span shares a character with one of others."""
    return any(span[0] < last and first < span[1] for first, last in others)


def encode_between(
    text: str,
    placed: Sequence[tuple[int, Span]],
    encode: Callable[[str, int], tuple[Sequence[int], Sequence[Span]]],
) -> Encoding:
    """Encode the stretches of a text between tokens that are placed in it.

    Args:
        text: The whole text.
        placed: The id and the place of each placed token, in order.
        encode: Gives the ids and offsets of a stretch that begins at a character of the text.
    """
    found = Encoding()
    begin = 0
    for token_id, (first, last) in placed:
        if begin < first:
            found.extend(*encode(text[begin:first], begin), at=begin)
        found.extend([token_id], [(0, last - first)], at=first)
        begin = last
    if begin < len(text):
        found.extend(*encode(text[begin:], begin), at=begin)
    return found


def widened(offsets: Sequence[Span]) -> list[Span]:
    """Return offsets in which bytes of one character, and a prefix of a word, have its span.

    SentencePiece gives them an empty one at its first character.
    """
    found = list(offsets)
    for index in reversed(range(len(found) - 1)):
        (first, last), following = found[index], found[index + 1]
        if first == last == following[0]:
            found[index] = (first, following[1])
    return found


def find_spelled(text: str, texts: Sequence[str]) -> Iterator[tuple[str, Span]]:
    """Yield where a text spells one of others, from left to right, the longest at each place."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    if longest_first:
        for found in re.finditer("|".join(map(re.escape, longest_first)), text):
            yield found[0], found.span()
