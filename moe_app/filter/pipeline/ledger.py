"""Writes down what happens to the documents of one file: dropped ones, counts and samples."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datatrove.data import Document

from megatron.trainer.errors import DataError
from megatron.trainer.io.atomic_write import AtomicFile, write_text
from moe_app.filter.filter_plan import FilterPlan
from moe_app.filter.records import BadEntry, Entry, json_line
from moe_app.filter.rules import Verdict
from moe_app.filter.work_folder import WorkFolder

_SAMPLE_SIZE = 5
_SAMPLE_CHARACTERS = 200
_BAD_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Says which filter drops a document, and why."""

    position: int
    """The filter's, in the recipe."""
    verdict: Verdict


class Ledger:
    """Takes what is dropped, as the exclusion writer of every filter of a reading.

    A recipe is read once, and again after each filter that needs all documents. Every reading but
    the last writes verdicts alone; the last writes the dropped documents and the counts, too.

    Args:
        plan: What is filtered.
        folder: Where to.
        number: Of this reading, from 0.
        is_last: Whether there is none after it.
    """

    def __init__(self, plan: FilterPlan, folder: WorkFolder, *, number: int, is_last: bool) -> None:
        self.plan = plan
        self.folder = folder
        self.number = number
        self.is_last = is_last
        self._file: AtomicFile | None = None
        self._reset()

    def _reset(self) -> None:
        self.documents = self.kept = self.num_bad = 0
        self.notes: Counter[str] = Counter()
        self._bad: list[BadEntry] = []
        self._dropped: dict[int, Counter[str]] = {}
        self._samples: dict[int, list[dict[str, object]]] = {}
        self._met: dict[int, Counter[str]] = {}

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: the last step of a pipeline commits what all filters wrote."""

    def begin(self, rank: int) -> None:
        """Start the ledger of one file."""
        self._reset()
        if self.is_last:
            path = self.folder.dropped / f"{self.plan.sources[rank].name}.jsonl"
        else:
            path = self.folder.verdicts(self.number, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AtomicFile(path)

    def write(self, document: Document, rank: int) -> None:
        """Write a dropped document; its metadata says why."""
        dropped: Dropped = document.metadata["dropped"]
        entry: Entry = document.metadata["entry"]
        assert self._file is not None
        try:
            line = self._line(entry, dropped)
        except DataError as error:
            raise DataError(f"{document.id}: {error}") from error
        self._file.file.write(line)
        counts = self._dropped.setdefault(dropped.position, Counter())
        counts[dropped.verdict.reason] += 1
        items: Any = dropped.verdict.detail.get("items", ())
        self._met.setdefault(dropped.position, Counter()).update(each["item"] for each in items)
        sample = self._samples.setdefault(dropped.position, [])
        if self.is_last and len(sample) < _SAMPLE_SIZE:
            sample.append(
                {
                    "file": self.plan.sources[rank].path,
                    "line": entry.line,
                    "reason": dropped.verdict.reason,
                    "detail": dict(dropped.verdict.detail),
                    "text": entry.text[:_SAMPLE_CHARACTERS],
                }
            )

    def _line(self, entry: Entry, dropped: Dropped) -> bytes:
        verdict = dropped.verdict
        if not self.is_last:
            value = [entry.line, dropped.position, verdict.reason, dict(verdict.detail)]
            return json.dumps(value).encode("ascii") + b"\n"
        name = self.plan.filters[dropped.position].name
        added = {"reason": f"{name}: {verdict.reason}", "detail": dict(verdict.detail)}
        earlier = {f"input_{key}": entry.value[key] for key in added if key in entry.value}
        if entry.raw is not None and not earlier:
            # Read and written again, a number might change: 1.10, or 1e999.
            return entry.raw.rstrip()[:-1] + b", " + json_line(added)[1:]
        return json_line(entry.value | earlier | added)

    def add_bad(self, bad: BadEntry) -> None:
        """Count what is no document.

        Raises:
            DataError: There are more than may be.
        """
        self.num_bad += 1
        if len(self._bad) < _BAD_LISTED:
            self._bad.append(bad)
        if self.num_bad > self.plan.max_bad_lines:
            raise too_many_bad(self.num_bad, self.plan.max_bad_lines, bad.problem)

    def commit(self, rank: int) -> None:
        """Make this file's dropped documents and counts appear, complete."""
        assert self._file is not None
        self._file.commit()
        self._file = None
        if not self.is_last:
            return
        path = self.folder.counts(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        value = {
            "documents": self.documents,
            "kept": self.kept,
            "num_bad": self.num_bad,
            "bad": [[bad.line, bad.problem] for bad in self._bad],
            "notes": dict(sorted(self.notes.items())),
            "dropped": {str(key): dict(value) for key, value in self._dropped.items()},
            "met": {str(key): dict(value) for key, value in self._met.items() if value},
            "samples": {str(key): value for key, value in self._samples.items()},
        }
        write_text(path, json.dumps(value))

    def discard(self) -> None:
        """Remove what was begun."""
        if self._file is not None:
            self._file.discard()
            self._file = None


def too_many_bad(count: int, most: int, problem: str) -> DataError:
    """Return the error for more bad lines than may be, with the place of one."""
    return DataError(
        f"{problem} ({count} bad lines so far; --max-bad-lines allows {most}: raise it to skip and"
        " count them)"
    )


def read_verdicts(folder: WorkFolder, *, readings: int, file: int) -> Mapping[int, Dropped]:
    """Return what the readings before this one decided on a file, by line."""
    found = {}
    for number in range(readings):
        for line, position, reason, detail in _lines(folder, number, file):
            found[line] = Dropped(position=position, verdict=Verdict(reason, detail))
    return found


def _lines(folder: WorkFolder, number: int, file: int) -> Iterator[Any]:
    with folder.verdicts(number, file).open("rb") as lines:
        yield from map(json.loads, lines)
