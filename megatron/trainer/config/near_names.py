"""Finds the known name that a wrong one was probably meant to be."""

from collections.abc import Iterable
from typing import NamedTuple

_LEAST_PREFIX = 3
"""Letters from which on the beginning of a word can stand for the word."""
_PREFIX_SHARE = 1 / 3
"""Part of the word that this beginning must be."""
_NAME_SHARE = 0.6
"""Part of a name that one of its words must be to stand for it."""
_MOST_SHOWN = 2


class _Distance(NamedTuple):
    """Says how far a known name is from a wrong one; compared in this order."""

    left_out: int
    """Words that the wrong one lacks."""
    is_beheaded: bool
    """Whether that is the first."""
    typos: int
    """Letters to change."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known names as the end of a message; empty if none is near."""
    near = " or ".join(repr(each) for each in near_names(name, known))
    return f"; did you mean {near}?" if near else ""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names nearest to `name`, the best first; none if no name is really near.

    Near are names whose words are the same but for a slip of the fingers or an ending, and names
    of which one word is left out. One other word makes another name: `rampup_batch_size` is not
    `micro_batch_size`.
    """
    far = {each: _distance(name, each) for each in known}
    near = {each: distance for each, distance in far.items() if distance is not None}
    best = min(near.values(), default=None)
    found = [each for each, distance in near.items() if distance == best]
    return found if len(found) <= _MOST_SHOWN else []


def _distance(name: str, known: str) -> _Distance | None:
    """Return how far two names are apart; None if neither can be meant by the other."""
    written, right = _words(name), _words(known)
    if len(written) == len(right):
        typos = _typos_of(written, right)
        return None if typos is None else _Distance(0, False, typos)
    joined = _typos("".join(written), "".join(right), allows_prefix=False)
    if joined is not None and joined <= 1:
        return _Distance(0, False, joined)
    if len(written) != len(right) - 1 or (
        len(written) == 1 and len(written[0]) < _NAME_SHARE * len("".join(right))
    ):
        return None
    choices = (
        _Distance(1, left_out == 0, typos)
        for left_out in range(len(right))
        if (typos := _typos_of(written, [*right[:left_out], *right[left_out + 1 :]])) is not None
    )
    return min(choices, default=None)


def _typos_of(written: list[str], right: list[str]) -> int | None:
    """Return how many letters differ in as many words; None if one is another word."""
    typos = [_typos(one, other) for one, other in zip(written, right, strict=True)]
    near = [count for count in typos if count is not None]
    return sum(near) if len(near) == len(typos) else None


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").strip("_").split("_")


def _typos(one: str, other: str, *, allows_prefix: bool = True) -> int | None:
    """Return how many letters two words differ in; None if they are different words."""
    if one == other:
        return 0
    short, long = sorted((one, other), key=len)
    least = max(_LEAST_PREFIX, _PREFIX_SHARE * len(long))
    if allows_prefix and len(short) >= least and long.startswith(short):
        return 1
    allowed = 0 if len(long) < 4 else 1 if len(long) < 8 else 2
    count = _edits(one, other) if len(long) - len(short) <= allowed else allowed + 1
    return count if count <= allowed else None


def _edits(one: str, other: str) -> int:
    """Count the letters to add, drop, replace or swap with their neighbour."""
    before, row = [0] * (len(other) + 1), list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        earlier, before, row = before, row, [i]
        for j, wanted in enumerate(other, start=1):
            count = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                count = min(count, earlier[j - 2] + 1)
            row.append(count)
    return row[-1]
