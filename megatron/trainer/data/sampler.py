"""Which phase of the run the next sample falls in, and which sample of which source it is.

A run is one or more phases, each with a mixture of its own. Within a phase a `Blend` keeps every
prefix in proportion, from the phase's first sample on. A source that stands in several phases goes
on where it stopped: its samples are numbered over the whole run, so that none of its documents
comes twice before an epoch ends. A branch begins after the phases of another run, which it carries
along as inherited ones: under the same seed its sources go on where that run stopped, under another
seed they are shuffled anew and begin at their first sample.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.trainer.data.blend import Blend
from megatron.trainer.errors import DataError

LEFT_OUT = "left_out"
"""Key of a phase's record: the samples of each source that were passed over, and are counted as
consumed; absent where there are none."""

_LARGEST_COUNT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run with a mixture of its own."""

    name: str | None = None
    """Name in tables and metrics; None in a run that has only one."""
    sources: tuple[str, ...]
    """Names of what is drawn from."""
    weights: tuple[float, ...]
    """Each source's share of the samples; only ratios matter."""
    num_samples: int | None = None
    """Samples of the phase; None means that it has no end."""


class Dealer:
    """Deals the samples of a run: phase by phase, source by source.

    Args:
        phases: In order; only the last may be without end.
        seed: What the sources are shuffled by.
        windows: Samples in an epoch of each source by name; None means there is no end.

    Raises:
        DataError: A weight is not positive.
        ValueError: No phase, an empty one, one without end before the last, or one whose sources
            do not exist or do not match its weights.
    """

    def __init__(
        self, phases: Sequence[Phase], *, seed: int, windows: Mapping[str, int | None]
    ) -> None:
        if not phases or any(phase.num_samples is None for phase in phases[:-1]):
            raise ValueError("there must be a phase, and only the last may be without end")
        if any(phase.num_samples is not None and phase.num_samples < 1 for phase in phases):
            raise ValueError("every phase must have at least one sample")
        for phase in phases:
            unknown = [name for name in phase.sources if name not in windows]
            if unknown:
                raise ValueError(
                    f"phases draw from {', '.join(unknown)}, which is not among the sources"
                    f" {', '.join(windows)}"
                )
            if len(phase.sources) != len(phase.weights):
                raise ValueError(f"{len(phase.sources)} sources, but {len(phase.weights)} weights")
        self.phases = tuple(phases)
        self.seed = seed
        self.windows = dict(windows)
        self.blends = tuple(Blend(phase.weights) for phase in phases)
        self._left_out: list[Counter[str]] = [Counter() for _ in phases]
        self._inherited: list[dict[str, Any]] = []
        self._current = 0
        self._drawn_before: Counter[str] = Counter()

    @property
    def phase(self) -> Phase:
        """The phase of the sample dealt last, or of the first."""
        return self.phases[self._current]

    @property
    def num_drawn(self) -> int:
        """Samples dealt or passed over so far, inherited ones included."""
        return sum(sum(record["consumed"]) for record in self._records())

    def drawn_per_source(self) -> dict[str, int]:
        """The same by source, in order of appearance."""
        counts: dict[str, int] = {}
        for record in self._records():
            for name, count in zip(record["sources"], record["consumed"], strict=True):
                counts[name] = counts.get(name, 0) + count
        return counts

    def draw(self) -> tuple[str, int]:
        """Deal the next sample.

        Returns:
            The source's name, and the sample's number in it, over all phases of this seed.

        Raises:
            DataError: The last phase is used up.
        """
        if self.blends[self._current].num_drawn == self.phase.num_samples:
            if self._current + 1 == len(self.phases):
                raise DataError(
                    f"all {len(self.phases)} phases are used up after {self.num_drawn} samples; the"
                    " run must end with its last phase; add a phase, or lower --train-iters"
                )
            self._enter(self._current + 1)
        index, number = self.blends[self._current].draw()
        name = self.phase.sources[index]
        passed_over = self._left_out[self._current][name]
        return name, self._drawn_before[name] + passed_over + number

    def leave_out(self, counts: Mapping[str, int]) -> None:
        """Pass over the next samples of each source, in the next phase that draws from it.

        Phases get no shorter by them, nor do their mixtures change.
        """
        for name, count in counts.items():
            for index in range(self._current, len(self.phases)):
                if name in self.phases[index].sources:
                    self._left_out[index][name] += count
                    break

    def state_dict(self) -> list[dict[str, Any]]:
        """Every phase, inherited ones first, and what was dealt in it, as plain JSON values."""
        return [dict(record) for record in self._records()]

    def load_state_dict(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Continue where another dealer stood.

        Args:
            records: What `state_dict` returned, already checked by `read_records`.

        Returns:
            What differs in phases still to come, a line each; that is allowed.

        Raises:
            DataError: A phase that has begun differs; the dealer is unchanged then.
        """
        inherited = [dict(record) for record in records if record["inherited"]]
        own = [record for record in records if not record["inherited"]]
        num_begun = sum(1 for record in own if _num_dealt(record))
        differences = []
        for index, record in enumerate(own[:num_begun]):
            differences += self._differences(index, record, is_last=index + 1 == num_begun)
        if differences:
            raise DataError(
                f"the checkpoint was trained on other data: {'; '.join(dict.fromkeys(differences))}"
                "; a resumed run must read the same samples; restore the data flags, or start the"
                " data anew with --finetune"
            )
        notes = self._changes_to_come(own, num_begun)
        self._inherited = inherited
        for blend, record in zip(self.blends, own[:num_begun], strict=False):
            blend.counts[:] = [
                count - passed_over
                for count, passed_over in zip(record["consumed"], _left_out(record), strict=True)
            ]
        for blend in self.blends[num_begun:]:
            blend.counts[:] = 0
        self._left_out = [Counter() for _ in self.phases]
        for counts, record in zip(self._left_out, own[:num_begun], strict=False):
            counts.update(dict(zip(record["sources"], _left_out(record), strict=True)))
        self._enter(max(0, num_begun - 1))
        for record in own[num_begun:]:  # which may be other phases now
            self.leave_out(dict(zip(record["sources"], _left_out(record), strict=True)))
        return notes

    def inherit(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Begin after what another run has dealt.

        Args:
            records: That run's `state_dict`, already checked by `read_records`.

        Returns:
            How each source of this run begins, a line each.

        Raises:
            DataError: A source that should go on is of another length now.
        """
        inherited = [{**record, "inherited": True} for record in records if sum(record["consumed"])]
        for record in inherited:
            for name, windows in zip(record["sources"], record["windows_per_epoch"], strict=True):
                if record["seed"] == self.seed and self.windows.get(name, windows) != windows:
                    raise DataError(
                        f"source {name!r} had {windows} windows per epoch in the run that is"
                        f" branched from, here it has {self.windows[name]}; a source that goes on"
                        " must be the same; restore it, or shuffle anew with another --seed"
                    )
        self._inherited = inherited
        self._enter(0)
        notes = []
        for name in dict.fromkeys(name for phase in self.phases for name in phase.sources):
            number = self._drawn_before[name]
            notes.append(
                f"{name}: goes on at sample {number}"
                if number
                else f"{name}: from its first sample"
            )
        return notes

    def _enter(self, index: int) -> None:
        """Make a phase the current one; count what its sources have dealt before it."""
        self._current = index
        self._drawn_before = Counter()
        for record in self._records()[: len(self._inherited) + index]:
            if record["seed"] == self.seed:
                self._drawn_before.update(
                    dict(zip(record["sources"], record["consumed"], strict=True))
                )

    def _records(self) -> list[dict[str, Any]]:
        own = []
        for phase, blend, counts in zip(self.phases, self.blends, self._left_out, strict=True):
            left_out = [counts[name] for name in phase.sources]
            record = {
                "name": phase.name,
                "inherited": False,
                "seed": self.seed,
                "num_samples": phase.num_samples,
                "sources": list(phase.sources),
                "weights": blend.weights.tolist(),
                "windows_per_epoch": [self.windows[name] for name in phase.sources],
                "consumed": [a + b for a, b in zip(blend.counts.tolist(), left_out, strict=True)],
            }
            own.append({**record, LEFT_OUT: left_out} if any(left_out) else record)
        return self._inherited + own

    def _differences(self, index: int, record: Mapping[str, Any], *, is_last: bool) -> list[str]:
        """What of a phase that has begun is not as it was."""
        where = f"phase {index + 1} ({record['name']}) " if record["name"] is not None else ""
        consumed = _num_dealt(record)
        if index >= len(self.phases):
            return [f"{where}has dealt {consumed} samples, this run has no such phase"]
        mine = self._records()[len(self._inherited) + index]
        found = [
            f"{'' if key == 'seed' else where}{key}: checkpoint {record[key]}, this run {mine[key]}"
            for key in ("seed", "sources", "windows_per_epoch", "weights")
            if record[key] != mine[key]
        ]
        limit = mine["num_samples"]
        if not is_last and limit != consumed:
            found.append(f"{where}num_samples: checkpoint {consumed}, this run {limit}")
        elif limit is not None and limit < consumed:
            found.append(
                f"{where}num_samples: the checkpoint has dealt {consumed}, this run {limit}"
            )
        return found

    def _changes_to_come(self, own: Sequence[Mapping[str, Any]], num_begun: int) -> list[str]:
        """What the checkpoint's run had planned otherwise for phases that are not over."""
        mine = self._records()[len(self._inherited) :]
        planned = [_plan(record) for record in own[max(0, num_begun - 1) :]]
        planned_here = [_plan(record) for record in mine[max(0, num_begun - 1) :]]
        if planned == planned_here:
            return []
        return [
            f"planned by the checkpoint: {'; '.join(planned)}",
            f"planned by this run: {'; '.join(planned_here)}",
        ]


def _left_out(record: Mapping[str, Any]) -> list[int]:
    """Samples of each source that a phase passed over."""
    return list(record.get(LEFT_OUT) or [0] * len(record["sources"]))


def _num_dealt(record: Mapping[str, Any]) -> int:
    """Samples that a phase has dealt; those passed over are none of them."""
    return sum(record["consumed"]) - sum(_left_out(record))


def _plan(record: Mapping[str, Any]) -> str:
    """A phase in words."""
    shares = ", ".join(
        f"{weight:.4g} {name}"
        for name, weight in zip(record["sources"], record["weights"], strict=True)
    )
    end = "no end" if record["num_samples"] is None else f"{record['num_samples']} samples"
    return f"{record['name'] or 'one phase'} ({end}: {shares})"


def read_records(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The phases in a checkpoint's data state, checked against each other.

    Raises:
        DataError: The state is incomplete or contradicts itself.
    """
    phases = state.get("phases")
    is_sound = isinstance(phases, list) and bool(phases) and all(map(_is_record, phases))
    if is_sound:
        records: list[dict[str, Any]] = [dict(phase) for phase in phases]  # type: ignore[union-attr]
        own = [_num_dealt(record) for record in records if not record["inherited"]]
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
        and _may_be_left_out(record.get(LEFT_OUT), consumed or ())
        and type(record.get("seed")) is int
        and isinstance(record.get("inherited"), bool)
        and isinstance(record.get("name", 0), str | None)
        and type(record.get("num_samples", "")) in (int, type(None))
    )


def _may_be_left_out(counts: Any, consumed: Sequence[int]) -> bool:
    """Whether these can be of the samples that a phase has consumed."""
    return counts is None or (
        isinstance(counts, list)
        and len(counts) == len(consumed)
        and all(
            type(count) is int and 0 <= count <= most
            for count, most in zip(counts, consumed, strict=True)
        )
    )
