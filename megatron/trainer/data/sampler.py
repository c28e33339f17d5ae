"""Computes which sample of which source each sample of the run is.

A run is one or more phases, each with a mixture of its own. Within a phase a `Blend` keeps every
prefix in proportion, from the phase's first sample on. A source that stands in several phases
continues where it stopped: its samples are numbered over the whole run, so that none of its
documents comes twice before an epoch ends. A branch begins after the phases of another run, which
it carries along as inherited ones: under the same seed its sources continue where that run stopped,
under another seed they are shuffled anew and begin at their first sample.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.trainer.data.blend import Blend
from megatron.trainer.data.phase_records import SKIPPED, describe_phase, num_drawn, num_skipped
from megatron.trainer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Describes a stretch of a run with a mixture of its own."""

    name: str | None = None
    """Name in tables and metrics; None in a run that has only one."""
    sources: tuple[str, ...]
    """Names of what is drawn from."""
    weights: tuple[float, ...]
    """Each source's share of the samples; only ratios matter."""
    num_samples: int | None = None
    """Samples of the phase; None means that it has no end."""
    whole_steps: int | None = None
    """The same rounded up to whole steps, where an earlier version may have ended it."""


class Sampler:
    """Draws the samples of a run: phase by phase, source by source.

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
        self.names = tuple(windows)
        """The sources in the order that `draw` numbers them in."""
        self.blends = tuple(Blend(phase.weights) for phase in phases)
        self._skipped: list[Counter[str]] = [Counter() for _ in phases]
        self._inherited: list[dict[str, Any]] = []
        self._current = 0
        self._drawn_before: Counter[str] = Counter()

    def copy(self) -> "Sampler":
        """Return a sampler at the same position that moves on by itself."""
        other = copy.copy(self)
        other.blends = tuple(copy.copy(blend) for blend in self.blends)
        other._skipped = [Counter(counts) for counts in self._skipped]
        return other

    @property
    def phase(self) -> Phase:
        """Return the phase of the sample drawn last, or of the first."""
        return self.phases[self._current]

    @property
    def num_drawn(self) -> int:
        """Return the samples drawn or skipped so far, inherited ones included."""
        inherited = sum(sum(record["consumed"]) for record in self._inherited)
        skipped = sum(counts.total() for counts in self._skipped)
        return inherited + skipped + sum(blend.num_drawn for blend in self.blends)

    @property
    def num_trained(self) -> tuple[int, int]:
        """Return the samples drawn so far, skipped ones not counted: all, and without inherited."""
        own = sum(blend.num_drawn for blend in self.blends)
        return own + sum(num_drawn(record) for record in self._inherited), own

    def drawn_per_source(self) -> dict[str, int]:
        """Return samples drawn or skipped so far by source, in order of appearance."""
        counts: dict[str, int] = {}
        for record in self._records():
            for name, count in zip(record["sources"], record["consumed"], strict=True):
                counts[name] = counts.get(name, 0) + count
        return counts

    def draw(self, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Draw the next n samples; the last phase gives more than it has rather than too few.

        Returns:
            Each sample's source [n], numbered as `names` are, and its number there [n], counted
            over all phases of this seed.

        Raises:
            DataError: All phases are over; nothing is drawn then.
        """
        self._require_some(n)
        sources, numbers = [], []
        while n:
            left = self._left(self._current)
            if self._current + 1 == len(self.phases):
                left = None
            elif left == 0:
                self._enter(self._current + 1)
                continue
            count = n if left is None else min(n, left)
            index, number = self.blends[self._current].draw(count)
            names, skipped = self.phase.sources, self._skipped[self._current]
            offsets = np.array([self._drawn_before[name] + skipped[name] for name in names])
            sources.append(np.array([self.names.index(name) for name in names])[index])
            numbers.append(number + offsets[index])
            n -= count
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *sources]), np.concatenate([empty, *numbers])

    def skip(self, counts: Mapping[str, int]) -> None:
        """Skip the next samples of each source, in the next phase that draws from it.

        Phases get no shorter by them, nor do their mixtures change.
        """
        for name, count in counts.items():
            for index in range(self._current, len(self.phases)):
                if name in self.phases[index].sources:
                    self._skipped[index][name] += count
                    break

    def state_dict(self) -> list[dict[str, Any]]:
        """Return a record of every phase, inherited ones first, as plain JSON values."""
        return [dict(record) for record in self._records()]

    def load_state_dict(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Continue where another sampler stood.

        Args:
            records: What `state_dict` returned, already checked by `read_records`.

        Returns:
            What differs in phases still to come, a line each; that is allowed.

        Raises:
            DataError: A phase that has begun differs; the sampler is unchanged then.
        """
        inherited = [dict(record) for record in records if record["inherited"]]
        own = [record for record in records if not record["inherited"]]
        num_begun = sum(1 for record in own if num_drawn(record))
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
        self._skipped = [Counter() for _ in self.phases]
        for blend in self.blends:
            blend.counts = np.zeros_like(blend.counts)
        for index, record in enumerate(own[:num_begun]):
            skipped = num_skipped(record)
            self.blends[index].counts = np.subtract(record["consumed"], skipped, dtype=np.int64)
            self._skipped[index].update(dict(zip(record["sources"], skipped, strict=True)))
        self._enter(max(0, num_begun - 1))
        for record in own[num_begun:]:  # which may be other phases now
            self.skip(dict(zip(record["sources"], num_skipped(record), strict=True)))
        return notes

    def inherit(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Begin after what another run has drawn.

        Args:
            records: That run's `state_dict`, already checked by `read_records`.

        Returns:
            How each source of this run begins, a line each.

        Raises:
            DataError: A source that should continue is of another length now.
        """
        inherited = [{**record, "inherited": True} for record in records if sum(record["consumed"])]
        for record in inherited:
            for name, windows in zip(record["sources"], record["windows_per_epoch"], strict=True):
                if record["seed"] == self.seed and self.windows.get(name, windows) != windows:
                    raise DataError(
                        f"source {name!r} had {windows} windows per epoch in the run that is"
                        f" branched from, here it has {self.windows[name]}; a source that continues"
                        " must be the same; restore it, or shuffle anew with another --seed"
                    )
        self._inherited = inherited
        self._enter(0)
        notes = []
        for name in dict.fromkeys(name for phase in self.phases for name in phase.sources):
            number = self._drawn_before[name]
            notes.append(
                f"{name}: continues at sample {number}"
                if number
                else f"{name}: from its first sample"
            )
        return notes

    def _left(self, index: int) -> int | None:
        """Return how many samples a phase has left; None for one without end."""
        total = self.phases[index].num_samples
        return None if total is None else max(0, total - self.blends[index].num_drawn)

    def _require_some(self, n: int) -> None:
        """Raise DataError if all phases are over, but n samples are to be drawn."""
        left = [self._left(index) for index in range(self._current, len(self.phases))]
        if n and all(count == 0 for count in left):
            raise DataError(
                f"all {len(self.phases)} phases are used up after {self.num_drawn} samples; the run"
                " must end with its last phase; add a phase, or lower --train-iters"
            )

    def _enter(self, index: int) -> None:
        """Make a phase the current one; count what its sources have drawn before it."""
        self._current = index
        self._drawn_before = Counter()
        for record in self._records()[: len(self._inherited) + index]:
            if record["seed"] == self.seed:
                self._drawn_before.update(
                    dict(zip(record["sources"], record["consumed"], strict=True))
                )

    def _records(self) -> list[dict[str, Any]]:
        own = []
        for phase, blend, counts in zip(self.phases, self.blends, self._skipped, strict=True):
            skipped = [counts[name] for name in phase.sources]
            record = {
                "name": phase.name,
                "inherited": False,
                "seed": self.seed,
                "num_samples": phase.num_samples,
                "sources": list(phase.sources),
                "weights": blend.weights.tolist(),
                "windows_per_epoch": [self.windows[name] for name in phase.sources],
                "consumed": [a + b for a, b in zip(blend.counts.tolist(), skipped, strict=True)],
            }
            own.append({**record, SKIPPED: skipped} if any(skipped) else record)
        return self._inherited + own

    def _differences(self, index: int, record: Mapping[str, Any], *, is_last: bool) -> list[str]:
        """Return what of a phase that has begun is not as it was."""
        where = f"phase {index + 1} ({record['name']}) " if record["name"] is not None else ""
        drawn = num_drawn(record)
        if index >= len(self.phases):
            return [f"{where}has drawn {drawn} samples, this run has no such phase"]
        mine = self._records()[len(self._inherited) + index]
        found = [
            f"{'' if key == 'seed' else where}{key}: checkpoint {record[key]}, this run {mine[key]}"
            for key in ("seed", "sources", "windows_per_epoch", "weights")
            if record[key] != mine[key]
        ]
        limit = mine["num_samples"]
        if self._may_have_drawn(index, record, is_over=not is_last):
            return found
        if is_last:
            found.append(f"{where}num_samples: the checkpoint has drawn {drawn}, this run {limit}")
        else:
            found.append(f"{where}num_samples: checkpoint {drawn}, this run {limit}")
        return found

    def _may_have_drawn(self, index: int, record: Mapping[str, Any], *, is_over: bool) -> bool:
        """Return whether a phase of this run may have as many samples drawn as a record says.

        What was the last phase may have drawn more than planned, to fill its last step.
        """
        phase, drawn = self.phases[index], num_drawn(record)
        if phase.num_samples is None or drawn < phase.num_samples:
            return not is_over
        is_as_planned = record["num_samples"] == phase.num_samples
        return is_as_planned or drawn in (phase.num_samples, phase.whole_steps)

    def _changes_to_come(self, own: Sequence[Mapping[str, Any]], num_begun: int) -> list[str]:
        """Return what the checkpoint's run had planned otherwise for phases that are not over."""
        mine = self._records()[len(self._inherited) :]
        planned = [describe_phase(record) for record in own[max(0, num_begun - 1) :]]
        planned_here = [describe_phase(record) for record in mine[max(0, num_begun - 1) :]]
        if planned == planned_here:
            return []
        return [
            f"planned by the checkpoint: {'; '.join(planned)}",
            f"planned by this run: {'; '.join(planned_here)}",
        ]
