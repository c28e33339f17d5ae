"""Finds what evaluations say of the tasks that a run scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.trainer.records.record_file import Record, scalars

ACCURACY = "task_accuracy"
"""Name in a record of accuracies by task and normalisation."""
BITS = "task_bits_per_byte"
"""Name in a record of bits per byte by task."""
DOCUMENTS = "valid_documents"
"""Name in a record of figures over documents by validation set."""
SHOWN = "char"
"""The normalisation that curves show."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Holds the scores of a run on one task."""

    name: str
    accuracy: Mapping[str, float]
    """Of the last evaluation by normalisation; empty where none is known."""
    bits_per_byte: float | None
    """Of the right choices in the last evaluation; None when it was not finite."""
    best: float | None
    """Highest accuracy of any evaluation under the normalisation of the curves."""
    best_iteration: int | None
    """When that was."""


def numbers_of(record: Record, key: str) -> dict[str, float]:
    """Return the numbers under a key of a record, nested ones as `outer/inner`."""
    found = record.get(key)
    try:
        return scalars(found) if isinstance(found, Mapping) else {}
    except OverflowError:  # a number that no float can hold
        return {}


def shown_accuracies(record: Record) -> dict[str, float]:
    """Return the accuracy of each task that a record's curves show."""
    ending = f"/{SHOWN}"
    found = numbers_of(record, ACCURACY)
    return {
        name.removesuffix(ending): each for name, each in found.items() if name.endswith(ending)
    }


def task_results(records: Sequence[Record]) -> list[TaskResult]:
    """Find the last and best scores of every task, in order of appearance."""
    last: dict[str, Record] = {}
    best: dict[str, tuple[float, int]] = {}
    for record in records:
        for name in (*shown_accuracies(record), *numbers_of(record, BITS)):
            last[name] = record
        for name, value in shown_accuracies(record).items():
            if name not in best or value > best[name][0]:
                best[name] = (value, record["iteration"])
    return [_result(name, record, best.get(name)) for name, record in last.items()]


def describe_tasks(record: Record) -> str:
    """Return an evaluation's scores in a few words; empty where it has none."""
    bits = numbers_of(record, BITS)
    parts = []
    for name, accuracy in shown_accuracies(record).items():
        told = f", {bits[name]:.3f} bits per byte" if name in bits else ""
        parts.append(f"{name} {accuracy:.1%}{told}")
    return "; ".join(parts)


def _result(name: str, record: Record, best: tuple[float, int] | None) -> TaskResult:
    accuracy = numbers_of(record, ACCURACY)
    return TaskResult(
        name=name,
        accuracy={
            key.removeprefix(f"{name}/"): value
            for key, value in accuracy.items()
            if key.startswith(f"{name}/")
        },
        bits_per_byte=numbers_of(record, BITS).get(name),
        best=None if best is None else best[0],
        best_iteration=None if best is None else best[1],
    )
