"""Reads what the runs of a sweep recorded into two tables, from which all else is made.

`results.csv` has a line for each run, seed and metric; `curves/RUN.csv` the thinned curves.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.tasks import shown_accuracies
from moe_app.ablate.studies_file import TASK, TRAIN, VALID
from moe_app.ablate.sweep_jobs import SweepJob
from moe_ext.counting import training_flops_per_token

MOST_POINTS = 200
"""Of a curve."""
LAST_SHARE = 0.02
"""Of the steps, over which the final training loss is a mean."""
LEAST_RECORDS = 3
"""Over which it is one, at least."""

_RESULTS = "results.csv"
_CURVES = "curves"
_REFUSED, _FAILED = "refused steps", "failed"
"""Lines of `results.csv` that are no metrics: of runs of which they say something."""
_RESULT_HEAD = ("run", "seed", "metric", "value", "tokens", "flops", "seconds", "tokens_per_second")
_CURVE_HEAD = ("seed", "curve", "tokens", "seconds", "value")


@dataclass(frozen=True, kw_only=True)
class Point:
    """Holds a value on the way."""

    tokens: float
    """Consumed so far."""
    seconds: float
    """Of training so far, without evaluation and saving."""
    value: float
    """Loss in nats per token, or accuracy."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Holds what became of a run under a seed."""

    run: str
    """The variant."""
    seed: int
    """Its seed."""
    tokens: float
    """Consumed in all, those of a trunk included."""
    flops: float
    """Of training on them."""
    seconds: float
    """Of training, without evaluation and saving."""
    final: Mapping[str, float] = field(default_factory=dict)
    """Final values by metric: `train`, `valid`, `valid SET`, `task NAME`."""
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    """Curves by metric."""
    diverged: tuple[str, ...] = ()
    """Metrics that ended at no number."""
    refused_steps: int = 0
    """Steps that the guard refused."""
    has_failed: bool = False
    """Whether it ended by an error, before its last step."""

    @property
    def faults(self) -> str:
        """Return what went wrong, in words; empty if nothing did."""
        parts = []
        if self.has_failed:
            parts.append("failed before its last step")
        if self.diverged:
            parts.append(f"no finite {', '.join(self.diverged)} in the end")
        if self.refused_steps:
            parts.append(f"{self.refused_steps} steps refused")
        return "; ".join(parts)

    def flops_at(self, tokens: float) -> float:
        """Return the FLOPs of training on the first tokens."""
        return self.flops / self.tokens * tokens if self.tokens else 0.0


def measure(job: SweepJob, trunk: Trained | None) -> Trained:
    """Read the records of a run that is finished, or has failed.

    Args:
        job: the run.
        trunk: the run that it branches from, whose tokens and seconds until there count; None if
            it begins by itself.

    Raises:
        ConfigError: they cannot be read.
    """
    history = RunHistory(job.directory)
    clock = _clock(job, history, trunk)
    losses = [
        Point(tokens=tokens, seconds=seconds, value=loss)
        for (tokens, seconds), loss in zip(
            clock[1:], history.steps[history.loss_name], strict=False
        )
        if math.isfinite(loss)
    ]
    evaluated: dict[str, list[Point]] = {}
    lacking: set[str] = set()
    for record in history.evaluations:
        tokens = float(record.get("consumed_tokens") or 0)
        scores = dict(_scores(record))
        lacking = (lacking - scores.keys()) | set(_lost(record))
        for metric, value in scores.items():
            point = Point(tokens=tokens, seconds=_seconds_at(clock, tokens), value=value)
            evaluated.setdefault(metric, []).append(point)
    final = {
        metric: points[-1].value for metric, points in evaluated.items() if metric not in lacking
    }
    curves = {metric: _thinned(points) for metric, points in evaluated.items()}
    recorded = history.steps[history.loss_name]
    if len(recorded) and not math.isfinite(recorded[-1]):
        lacking.add(TRAIN)
    if losses:
        last = _last_losses(losses, start=clock[0][0])
        if TRAIN not in lacking:
            final = {TRAIN: math.fsum(last) / len(last), **final}
        curves = {TRAIN: averaged(losses, MOST_POINTS), **curves}
    tokens, seconds = clock[-1]
    per_token = training_flops_per_token(job.cfg.model, job.cfg.training.seq_length)
    return Trained(
        run=job.run.name,
        seed=job.seed,
        tokens=tokens,
        flops=per_token * tokens,
        seconds=seconds,
        final={} if job.state != "finished" else final,
        curves=curves,
        diverged=tuple(sorted(lacking)),
        refused_steps=round(sum(each for each in history.steps["skipped"] if math.isfinite(each))),
        has_failed=job.state != "finished",
    )


def averaged(points: Sequence[Point], limit: int) -> list[Point]:
    """Return at most `limit` points, each the mean of as many and at the last of them."""
    size = -(-len(points) // limit)
    return [
        Point(
            tokens=part[-1].tokens,
            seconds=part[-1].seconds,
            value=math.fsum(each.value for each in part) / len(part),
        )
        for start in range(0, len(points), size)
        for part in [points[start : start + size]]
    ]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return every n-th point, the last among them, at most `MOST_POINTS`."""
    return list(points[:: -max(1, -(-len(points) // MOST_POINTS))])[::-1]


def _clock(job: SweepJob, history: RunHistory, trunk: Trained | None) -> list[tuple[float, float]]:
    """Return tokens and seconds at the start and at each of the steps' records."""
    training = job.cfg.training
    consumed = list(history.steps["consumed_tokens"])
    start = 0.0
    if job.run.anneal_from is not None:
        start = float(job.run.anneal_from.iteration * training.global_batch_size)
        start *= training.seq_length
    before = [(0.0, 0.0)]
    if trunk is not None:
        before += [(each.tokens, each.seconds) for each in trunk.curves.get(TRAIN, ())]
    clock = [(start, _seconds_at(before, start))]
    speeds = history.steps["tokens_per_second"]
    for tokens, speed in zip(consumed, speeds, strict=False):
        last, seconds = clock[-1]
        clock.append((tokens, seconds + ((tokens - last) / speed if speed > 0 else 0.0)))
    return clock


def _seconds_at(clock: Sequence[tuple[float, float]], tokens: float) -> float:
    """Return the seconds after so many tokens, between two records in proportion."""
    for (before, start), (after, end) in itertools.pairwise(clock):
        if before <= tokens <= after:
            share = (tokens - before) / (after - before) if after > before else 1.0
            return start + share * (end - start)
    return clock[-1][1]


def _scores(record: Record) -> Iterator[tuple[str, float]]:
    """Yield metric and value of what an evaluation found."""
    losses = record["valid_loss"]
    known = [loss for loss in losses.values() if loss is not None]
    if known and len(known) == len(losses):
        yield VALID, math.fsum(known) / len(known)
    for name, loss in losses.items():
        if loss is not None:
            yield f"{VALID} {name}", loss
    for task, accuracy in shown_accuracies(record).items():
        yield f"{TASK} {task}", accuracy


def _lost(record: Record) -> Iterator[str]:
    """Yield the losses that an evaluation found to be no number."""
    lost = [name for name, loss in record["valid_loss"].items() if loss is None]
    if lost:
        yield VALID
    yield from (f"{VALID} {name}" for name in lost)


def _last_losses(losses: Sequence[Point], *, start: float) -> list[float]:
    """Return the training losses of the last steps of a run that began after so many tokens."""
    last = losses[-1].tokens
    count = sum(each.tokens > last - (last - start) * LAST_SHARE for each in losses)
    return [each.value for each in losses[-max(count, LEAST_RECORDS) :]]


def write_tables(directory: Path, runs: Sequence[Trained]) -> None:
    """Write `results.csv` and `curves/RUN.csv`."""
    lines: list[list[object]] = [
        [run.run, run.seed, metric, repr(value), *_costs(run)]
        for run in runs
        for metric, value in _result_lines(run)
    ]
    write_text(directory / _RESULTS, csv_text(_RESULT_HEAD, lines))
    (directory / _CURVES).mkdir(exist_ok=True)
    for name in dict.fromkeys(run.run for run in runs):
        lines = [
            [run.seed, metric, f"{at.tokens:.0f}", f"{at.seconds:.1f}", f"{at.value:.6g}"]
            for run in runs
            if run.run == name
            for metric, points in run.curves.items()
            for at in points
        ]
        write_text(directory / _CURVES / f"{name}.csv", csv_text(_CURVE_HEAD, lines))


def _result_lines(run: Trained) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a run, nan where there is no number, and what went wrong."""
    yield from run.final.items()
    for metric in run.diverged:
        yield metric, math.nan
    if run.refused_steps:
        yield _REFUSED, run.refused_steps
    if run.has_failed:
        yield _FAILED, 1


def _with_result(run: Trained, metric: str, value: float) -> Trained:
    """Return a run with what a line of `results.csv` says of it."""
    if metric == _REFUSED:
        return replace(run, refused_steps=int(value))
    if metric == _FAILED:
        return replace(run, has_failed=True)
    if not math.isfinite(value):
        return replace(run, diverged=(*run.diverged, metric))
    return replace(run, final={**run.final, metric: value})


def _costs(run: Trained) -> tuple[str, ...]:
    speed = run.tokens / run.seconds if run.seconds else 0.0
    return f"{run.tokens:.0f}", f"{run.flops:.6g}", f"{run.seconds:.1f}", f"{speed:.1f}"


def read_tables(directory: Path) -> list[Trained]:
    """Read what `write_tables` wrote.

    Raises:
        ConfigError: a table is not there, or is none.
    """
    found: dict[tuple[str, int], Trained] = {}
    path = directory / _RESULTS
    try:
        for line in _lines(path, _RESULT_HEAD):
            key = (line["run"], int(line["seed"]))
            if key not in found:
                found[key] = Trained(
                    run=key[0],
                    seed=key[1],
                    tokens=float(line["tokens"]),
                    flops=float(line["flops"]),
                    seconds=float(line["seconds"]),
                )
            found[key] = _with_result(found[key], line["metric"], float(line["value"]))
        for name in dict.fromkeys(name for name, _ in found):
            path = directory / _CURVES / f"{name}.csv"
            curves: dict[int, dict[str, list[Point]]] = {}
            for line in _lines(path, _CURVE_HEAD):
                of_seed = curves.setdefault(int(line["seed"]), {})
                of_seed.setdefault(line["curve"], []).append(
                    Point(
                        tokens=float(line["tokens"]),
                        seconds=float(line["seconds"]),
                        value=float(line["value"]),
                    )
                )
            for seed, each in curves.items():
                if (name, seed) in found:
                    found[name, seed] = replace(found[name, seed], curves=each)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; it must be a table that a sweep has written; write it"
            " again from the runs"
        ) from error
    return list(found.values())


def _lines(path: Path, head: Sequence[str]) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(head):
            raise ValueError(f"its first line must be {','.join(head)}")
        for line in reader:
            if None in line or None in line.values():
                raise ValueError(f"line {reader.line_num} does not have {len(head)} values")
            yield line


def csv_text(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Format a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return text.getvalue()
