"""Reads what a checkpoint says about the phases of a run, and checks it.

A record is a phase as plain JSON values: name, inherited, seed, num_samples, and for each source
sources, weights, windows_per_epoch, consumed and, where there are any, skipped samples.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.trainer.errors import DataError

SKIPPED = "left_out"
"""Key of a record: the samples of each source that were skipped, and are counted as consumed;
absent where there are none."""

_LARGEST_COUNT = 1 << 62


def num_skipped(record: Mapping[str, Any]) -> list[int]:
    """Return the samples of each source that a phase skipped."""
    return list(record.get(SKIPPED) or [0] * len(record["sources"]))


def num_drawn(record: Mapping[str, Any]) -> int:
    """Return the samples that a phase has drawn; skipped ones do not count."""
    return sum(record["consumed"]) - sum(num_skipped(record))


def describe_phase(record: Mapping[str, Any]) -> str:
    """Return name, length and mixture of a phase in words."""
    shares = ", ".join(
        f"{weight:.4g} {name}"
        for name, weight in zip(record["sources"], record["weights"], strict=True)
    )
    end = "no end" if record["num_samples"] is None else f"{record['num_samples']} samples"
    return f"{record['name'] or 'one phase'} ({end}: {shares})"


def read_records(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the phases in a checkpoint's data state, checked against each other.

    Raises:
        DataError: The state is incomplete or contradicts itself.
    """
    phases = state.get("phases")
    is_sound = isinstance(phases, list) and bool(phases) and all(map(_is_record, phases))
    if is_sound:
        records: list[dict[str, Any]] = [dict(phase) for phase in phases]  # type: ignore[union-attr]
        own = [num_drawn(record) for record in records if not record["inherited"]]
        # No phase begins before the one before it has.
        is_sound = sum(sum(record["consumed"]) for record in records) == state.get(
            "consumed_samples"
        ) and all(first or not later for first, later in itertools.pairwise(own))
    if not is_sound:
        raise DataError(
            f"the checkpoint's data state has phases {phases} and consumed_samples"
            f" {state.get('consumed_samples')}; each phase must name sources and give each a weight"
            " and a count >= 0, phases must begin in order, and the counts must add up to"
            " consumed_samples; load another checkpoint"
        )
    return records


def read_fingerprints(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the fingerprints of sources in a checkpoint's data state; none in one of before.

    Raises:
        DataError: They are something else.
    """
    found = state.get("fingerprints", {})
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise DataError(
            f"the checkpoint's data state has fingerprints {found!r:.200}; there must be a text for"
            " each source; load another checkpoint"
        )
    return found


def drawn_sources(records: Sequence[Mapping[str, Any]], *, seed: int) -> list[str]:
    """Return the sources that phases of this seed have drawn from, or skipped samples of."""
    return [
        name
        for record in records
        if record["seed"] == seed
        for name, count in zip(record["sources"], record["consumed"], strict=True)
        if count
    ]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    lists = [record.get(key) for key in ("sources", "weights", "windows_per_epoch", "consumed")]
    if not all(isinstance(values, list) and len(values) == len(lists[0] or ()) for values in lists):
        return False
    sources, weights, windows, consumed = lists
    return (
        bool(sources)
        and all(type(weight) is float for weight in weights or ())
        and all(count is None or type(count) is int for count in windows or ())
        and all(isinstance(name, str) for name in sources or ())
        and all(type(count) is int and 0 <= count < _LARGEST_COUNT for count in consumed or ())
        and _are_skipped_counts(record.get(SKIPPED), consumed or ())
        and type(record.get("seed")) is int
        and isinstance(record.get("inherited"), bool)
        and isinstance(record.get("name", 0), str | None)
        and type(record.get("num_samples", "")) in (int, type(None))
    )


def _are_skipped_counts(counts: Any, consumed: Sequence[int]) -> bool:
    """Return whether these can be among the samples that a phase has consumed."""
    return counts is None or (
        isinstance(counts, list)
        and len(counts) == len(consumed)
        and all(
            type(count) is int and 0 <= count <= most
            for count, most in zip(counts, consumed, strict=True)
        )
    )
