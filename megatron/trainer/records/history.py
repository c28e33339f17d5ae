"""Reads a run directory into columns of numbers, and keeps them up to date."""

import math
import statistics
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.trainer.errors import ConfigError
from megatron.trainer.records.losses import LOSSES, loss_name
from megatron.trainer.records.record_file import Record, scalars
from megatron.trainer.records.run_dir import (
    CONFIG_NAME,
    EVENTS_NAME,
    METRICS_NAME,
    RecordTail,
    last_sign,
    read_ended,
    read_settings,
)

PATIENCE_S = 120.0
"""A run that has written nothing for so long is silent, unless it writes more rarely than that."""
_RECENT = 20


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Holds the losses of a run on one validation set."""

    name: str
    """The set."""
    last: float | None
    """Loss of the last evaluation, nats per token; None when it was not finite."""
    best: float | None
    """Least loss of any evaluation; None when none was finite."""
    best_iteration: int | None
    """When that was."""
    entropy: float | None
    """Unigram entropy of the whole set, nats per token; None when it is not known."""

    @property
    def is_below_entropy(self) -> bool:
        """Return whether the last loss is below the entropy; False where one is not known."""
        return self.last is not None and self.entropy is not None and self.last < self.entropy


def validation_results(
    records: Sequence[Record], entropies: Mapping[str, float]
) -> list[Validation]:
    """Find the last and best loss of every set that was evaluated, in order of appearance."""
    evaluations = [record for record in records if "valid_loss" in record]
    names = list(dict.fromkeys(name for record in evaluations for name in record["valid_loss"]))
    results = []
    for name in names:
        losses = [
            (record["iteration"], record["valid_loss"][name])
            for record in evaluations
            if name in record["valid_loss"]
        ]
        finite = [(loss, iteration) for iteration, loss in losses if loss is not None]
        best, best_iteration = min(finite, default=(None, None))
        results.append(
            Validation(
                name=name,
                last=losses[-1][1],
                best=best,
                best_iteration=best_iteration,
                entropy=entropies.get(name),
            )
        )
    return results


class Columns:
    """Holds the numbers of records, a column for each name; NaN where a record has none."""

    def __init__(self) -> None:
        self.by_name: dict[str, array[float]] = {}
        """The columns, all of the same length."""
        self.length = 0
        """Records so far."""

    def append(self, numbers: Mapping[str, float]) -> None:
        """Add a record."""
        for name in numbers:
            if name not in self.by_name:
                self.by_name[name] = array("d", [math.nan]) * self.length
        for name, column in self.by_name.items():
            column.append(numbers.get(name, math.nan))
        self.length += 1

    def __getitem__(self, name: str) -> Sequence[float]:
        """Return a column; empty if no record has such a number."""
        return self.by_name.get(name, array("d"))

    def last(self, name: str) -> float | None:
        """Return the last record's number; None if there is none, or it was not finite."""
        column = self[name]
        return column[-1] if column and math.isfinite(column[-1]) else None


@dataclass(frozen=True, kw_only=True)
class PlannedEnd:
    """Holds where a run will end: its settings only know what is so if all steps have one batch."""

    train_iters: int
    """Steps that will be done."""
    train_tokens: int
    """Tokens that will be consumed."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Holds a line of `events.jsonl`."""

    iteration: int
    """Optimizer steps done."""
    name: str
    """What happened, one word."""
    time: str
    """When, in UTC; may be empty."""
    detail: str
    """The same in words; may be empty."""
    end: PlannedEnd | None = None
    """Where the run will end, if the event says so."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Says whether a run goes on."""

    kind: Literal["starting", "running", "silent", "ended"]
    """Silent is a run that neither writes nor has said that it ended."""
    text: str
    """The same for a reader."""
    is_over: bool
    """Whether nothing more is to come: it ended, and is not to be started again."""


class RunHistory:
    """Holds settings, records and events of a run; `refresh` reads what has been added.

    Args:
        directory: of a run, see `check_run`.
        layer_keys: lists of a number per layer to keep as well, by their names in a record.

    Raises:
        ConfigError: its settings cannot be read.
    """

    def __init__(self, directory: Path, *, layer_keys: Sequence[str] = ()) -> None:
        self.directory = directory
        self.settings: dict[str, str] = {}
        self.steps = Columns()
        """Every number of the steps' records, nested ones under `outer/inner`."""
        self.evaluations: list[Record] = []
        """The evaluations' records, each with `valid_loss`, None where a loss was not finite."""
        self.phases: list[tuple[int, str]] = []
        """Records that begin a phase: their number in `steps`, and its name."""
        self.layers: dict[str, list[Sequence[float]]] = {key: [] for key in layer_keys}
        """For each record in `steps` the list of that name; empty where it has none."""
        self.events: list[Event] = []
        self._metrics = RecordTail(directory / METRICS_NAME)
        self._events = RecordTail(directory / EVENTS_NAME)
        self._config_time = -1
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since the last time."""
        self._read_settings()
        starts_over, records = self._metrics.read_new()
        if starts_over:
            self.steps = Columns()
            self.evaluations.clear()
            self.phases.clear()
            for rows in self.layers.values():
                rows.clear()
        for record in records:
            try:
                self._add(record)
            except OverflowError:  # a number that no float can hold
                self._metrics.unreadable += 1
        starts_over, events = self._events.read_new()
        if starts_over:
            self.events.clear()
        self.events += [_event(record) for record in events]

    @property
    def unreadable(self) -> int:
        """Count the damaged lines of metrics and events."""
        return self._metrics.unreadable + self._events.unreadable

    @property
    def skipped(self) -> int:
        """Count skipped steps; without events, those among the steps that have records."""
        events = sum(event.name == "skip" for event in self.events)
        return max(events, sum(value > 0 for value in self.steps["skipped"]))

    @property
    def iteration(self) -> int:
        """Return the optimizer steps done, as far as records say."""
        last = self.evaluations[-1]["iteration"] if self.evaluations else 0
        return max(last, int(self.steps.last("iteration") or 0))

    @property
    def train_iters(self) -> int | None:
        """Return the optimizer steps to do; None if neither events nor settings say.

        Settings hold what it would be if all steps had their batch.
        """
        return self.end.train_iters if self.end else self._whole_number("train_iters")

    @property
    def log_interval(self) -> int:
        """Return the steps between records."""
        return self._whole_number("log_interval") or 1

    def seconds_per_step(self) -> float | None:
        """Return the last records' median, without evaluation and saving; None if not known."""
        speeds = [speed for speed in self.steps["tokens_per_second"][-_RECENT:] if speed > 0]
        tokens = self._tokens_per_step()
        return tokens / statistics.median(speeds) if speeds and tokens else None

    def seconds_left(self) -> float | None:
        """Return the time until all steps are done at this speed; None if not known."""
        seconds, planned = self.seconds_per_step(), self.train_iters
        if seconds is None or planned is None:
            return None
        consumed, tokens = self.steps.last("consumed_tokens"), self._tokens_per_step()
        if self.end is not None and consumed is not None and tokens:
            # Steps to come may have other batches than the last one.
            return max(0.0, self.end.train_tokens - consumed) * seconds / tokens
        return max(0, planned - self.iteration) * seconds

    def training_seconds(self) -> float | None:
        """Return the time of recorded steps, without evaluation and saving; None if not known."""
        total, before = 0.0, None
        if self._tokens_per_step() is None or not self.steps.length:
            return None
        speeds = self.steps["tokens_per_second"]
        for number, (iteration, speed) in enumerate(
            zip(self.steps["iteration"], speeds, strict=False)
        ):
            steps = self.log_interval if before is None else iteration - before
            tokens = self._tokens_per_step(number) or 0
            total += steps * tokens / speed if speed > 0 else 0.0
            before = iteration
        return total

    def state(self, now: float) -> RunState:
        """Return whether the run goes on.

        Args:
            now: seconds since 1970.
        """
        ended = read_ended(self.directory)
        if ended is not None:
            text = f"ended: {ended}" + (", to be started again" if ended.requeue else "")
            return RunState(kind="ended", text=text, is_over=not ended.requeue)
        silence = now - last_sign(self.directory)
        interval = self.log_interval * (self.seconds_per_step() or 0.0)
        if silence > max(PATIENCE_S, 5 * interval):
            is_done = self.train_iters is not None and self.iteration >= self.train_iters
            if is_done:
                return RunState(kind="ended", text="all steps done", is_over=True)
            return RunState(kind="silent", text=f"silent for {duration(silence)}", is_over=False)
        if not self.steps.length:
            return RunState(kind="starting", text="no record yet", is_over=False)
        return RunState(kind="running", text="running", is_over=False)

    def _read_settings(self) -> None:
        path = self.directory / CONFIG_NAME
        changed = path.stat().st_mtime_ns
        if changed == self._config_time:
            return
        try:
            self.settings = read_settings(self.directory)
        except ConfigError:
            if not self.settings:
                raise
            return  # being written by a run that starts again; the next refresh reads it
        self._config_time = changed

    def _whole_number(self, setting: str) -> int | None:
        text = self.settings.get(setting, "").replace("_", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    @property
    def end(self) -> PlannedEnd | None:
        """Return where the run will end, as its last event about that says."""
        return next((each.end for each in reversed(self.events) if each.end is not None), None)

    def _tokens_per_step(self, number: int = -1) -> float | None:
        """Return the tokens of a record's step; the settings' where it does not say its batch."""
        recorded = self.steps["global_batch_size"]
        batch: float | None = self._whole_number("global_batch_size")
        if recorded and math.isfinite(recorded[number]):
            batch = recorded[number]
        length = self._whole_number("seq_length")
        return batch * length if batch and length else None

    @property
    def loss_name(self) -> str:
        """Return the name of the loss of the steps' records."""
        return next((name for name in LOSSES if len(self.steps[name])), "lm_loss")

    def _add(self, record: Record) -> None:
        if isinstance(record.get("valid_loss"), Mapping):
            losses = {name: finite(loss) for name, loss in record["valid_loss"].items()}
            self.evaluations.append({**record, "valid_loss": losses})
        if loss_name(record) is None:
            return
        phase = record.get("phase")
        if phase is not None and (not self.phases or self.phases[-1][1] != phase):
            self.phases.append((self.steps.length, str(phase)))
        for key, rows in self.layers.items():
            values = record.get(key)
            numbers = [finite(value) for value in values] if isinstance(values, list) else []
            rows.append(array("d", [math.nan if each is None else each for each in numbers]))
        self.steps.append(scalars(record))


def finite(value: Any) -> float | None:
    """Return a number that can be drawn; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def _event(record: Record) -> Event:
    return Event(
        iteration=record["iteration"],
        name=str(record.get("event") or "?"),
        time=str(record.get("time") or ""),
        detail=str(record.get("detail") or ""),
        end=_planned_end(record),
    )


def _planned_end(event: Record) -> PlannedEnd | None:
    steps, tokens = event.get("train_iters"), event.get("train_tokens")
    if type(steps) is not int or type(tokens) is not int or min(steps, tokens) < 1:
        return None
    return PlannedEnd(train_iters=steps, train_tokens=tokens)


def planned_end(events: Iterable[Record]) -> PlannedEnd | None:
    """Return where a run will end, as the last of its events about that says."""
    found = [end for end in map(_planned_end, events) if end is not None]
    return found[-1] if found else None


def thin(values: Sequence[float], limit: int) -> list[int]:
    """Select indices of `values`, at most `limit`, that draw the same curve.

    Kept are the ends, and of each stretch the lowest, the highest and one that is not finite.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    stretches = max(1, (limit - 2) // 3)
    kept = {0, count - 1}
    for number in range(stretches):
        part = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [index for index in part if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(part):
            kept.add(next(index for index in part if not math.isfinite(values[index])))
    return sorted(kept)


def duration(seconds: float) -> str:
    """Write a time in its two largest units: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    minutes = round(total / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
