"""Finds runs of a repeated n-gram of tokens: OLMoE's rule against degenerate text.

A run is a stretch of tokens in which each equals the one a period before it. Its repeats are its
whole periods, so a part of a period at either end counts only where both make one up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RepetitionRule:
    """Says which runs are too long; the defaults are OLMoE's (arXiv 2409.02060, section 2)."""

    repeats: int = 32
    """Fewest repeats that are too many."""
    min_period: int = 1
    """Length of the shortest n-gram, in tokens."""
    max_period: int = 13
    """Length of the longest n-gram, in tokens."""

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ConfigError(
                f"repeats is {self.repeats}; it must be at least 2, since every text holds each of"
                " its n-grams once; the papers take 32"
            )
        if not 1 <= self.min_period <= self.max_period:
            raise ConfigError(
                f"min_period ({self.min_period}) and max_period ({self.max_period}) must be at"
                " least 1 and in this order; the papers take 1 and 13"
            )


@dataclass(frozen=True)
class Repetition:
    """Describes the longest run of the shortest period that has too many repeats."""

    period: int
    """Length of the n-gram, in tokens."""
    repeats: int
    start: int
    """Index of the run's first token."""


OLMOE_RULE = RepetitionRule()


def find_repetition(
    ids: npt.NDArray[np.integer], rule: RepetitionRule = OLMOE_RULE
) -> Repetition | None:
    """Return a run that the rule forbids; None where there is none.

    Args:
        ids: [n] tokens of a document or of a training sample.
        rule: Which runs are too long.
    """
    for period in range(rule.min_period, min(rule.max_period, len(ids) // rule.repeats) + 1):
        found = _longest_run(ids, period, (rule.repeats - 1) * period)
        if found is not None:
            start, matches = found
            return Repetition(period, (matches + period) // period, start)
    return None


def _longest_run(ids: npt.NDArray[np.integer], period: int, matches: int) -> tuple[int, int] | None:
    """Return start and length of the longest run of tokens that equal the one a period later.

    None where it has fewer than `matches` of them. Such a run holds a multiple of `matches`, and
    the token half as far to its left or its right: looking at those alone settles most texts.
    """
    earlier, later = ids[:-period], ids[period:]
    candidates = np.flatnonzero(earlier[::matches] == later[::matches]) * matches
    if candidates.size == 0:
        return None
    half = matches // 2
    left = candidates[candidates >= half] - half
    right = candidates[candidates < earlier.size - half] + half
    if not (earlier[left] == later[left]).any() and not (earlier[right] == later[right]).any():
        return None
    breaks = np.flatnonzero(earlier != later)
    edges = np.concatenate(([-1], breaks, [earlier.size]))
    lengths = np.diff(edges) - 1
    longest = int(lengths.argmax())
    if lengths[longest] < matches:
        return None
    return int(edges[longest]) + 1, int(lengths[longest])
