"""Decides on documents one by one: StarCoder's rules and bounds of length.

A word is a longest run of characters that are not white space, as `str.split` finds them, compared
as it is written. The OLMoE paper gives no definition; code has few words in the dictionary's sense.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.trainer.errors import ConfigError

STAR_KEYS = ("max_stars_count", "stars")
"""Where a repository's stars are: in StarCoder's data, and as others name it."""
META_KEYS = ("metadata", "meta")
"""Objects of a document in which its star count may be."""

LengthUnit = Literal["characters", "bytes", "words", "tokens"]
LENGTH_UNITS: tuple[LengthUnit, ...] = ("characters", "bytes", "words", "tokens")


@dataclass(frozen=True)
class Verdict:
    """Says why a document is dropped."""

    reason: str
    """One of a few words, by which documents are counted."""
    detail: Mapping[str, object]
    """What was found, for a reader."""


@dataclass(frozen=True, kw_only=True)
class StarcoderRule:
    """Drops code of unknown repositories and documents of few words, as OLMoE did."""

    min_stars: int = 2
    """Fewest stars of the repository; 0 asks for none."""
    top_word: float = 0.3
    """Largest share of the most frequent word."""
    top_two_words: float = 0.5
    """Largest share of the two most frequent words together."""
    stars_key: str | None = None
    """Key of the star count; None looks for `max_stars_count`, then `stars`."""

    def __post_init__(self) -> None:
        for name in ("top_word", "top_two_words"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ConfigError(f"{name} is {share}; a share must be above 0 and at most 1")

    def judge(self, text: str, value: Mapping[str, Any]) -> Verdict | None:
        """Return why a document is dropped; None keeps it.

        Args:
            text: The document.
            value: Its object. A document without a star count passes that test; null, as
                StarCoder's data has it for no star, counts as none.
        """
        stars = find_stars(value, self.stars_key)
        if stars is not None and stars < self.min_stars:
            return Verdict("stars", {"stars": stars})
        words = text.split()
        if not words:
            return None
        (word, first), *others = Counter(words).most_common(2)
        second = others[0][1] if others else 0
        if first > self.top_word * len(words):
            return Verdict("top-word", {"word": word[:50], "share": first / len(words)})
        if first + second > self.top_two_words * len(words):
            pair = [word[:50], others[0][0][:50]] if others else [word[:50]]
            return Verdict("top-two-words", {"words": pair, "share": (first + second) / len(words)})
        return None


def find_stars(value: Mapping[str, Any], key: str | None) -> float | None:
    """Return a document's star count; None where it has none that is a number.

    Args:
        value: The document's object; the count is in it or in its object of metadata.
        key: Where; None for the first of `STAR_KEYS`.
    """
    places = [value, *(value[name] for name in META_KEYS if isinstance(value.get(name), dict))]
    for name in (key,) if key else STAR_KEYS:
        for place in places:
            if name in place:
                stars = place[name]
                if stars is None:
                    return 0
                is_number = isinstance(stars, int | float) and not isinstance(stars, bool)
                return stars if is_number else None
    return None


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """Drops documents that are too short or too long."""

    min: int | None = None
    """Smallest length; None for no bound."""
    max: int | None = None
    """Largest length; None for no bound."""
    unit: LengthUnit = "characters"

    def __post_init__(self) -> None:
        if self.unit not in LENGTH_UNITS:
            raise ConfigError(f"unit is {self.unit!r}; it must be one of {', '.join(LENGTH_UNITS)}")
        if self.min is None and self.max is None:
            raise ConfigError(
                "length has neither min nor max; it must have one of them or both; write for"
                " example length:min=100"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(
                f"min ({self.min}) must be at most max ({self.max}), or no document is kept"
            )

    def judge(self, text: str, count_tokens: Callable[[str], int]) -> Verdict | None:
        """Return why a document is dropped; None keeps it.

        Args:
            text: The document.
            count_tokens: Counts a text's tokens; called for the unit `tokens` alone.
        """
        length = self._length(text, count_tokens)
        if self.min is not None and length < self.min:
            return Verdict("too-short", {self.unit: length})
        if self.max is not None and length > self.max:
            return Verdict("too-long", {self.unit: length})
        return None

    def _length(self, text: str, count_tokens: Callable[[str], int]) -> int:
        if self.unit == "characters":
            return len(text)
        if self.unit == "bytes":
            return len(text.encode("utf-8"))
        return len(text.split()) if self.unit == "words" else count_tokens(text)
