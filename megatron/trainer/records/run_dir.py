"""Reads run directories, also during the run. Needs no torch, so viewers start at once."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from megatron.trainer.config.recipe import recipe_nodes
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.bounded_read import open_regular, read_small
from megatron.trainer.records.record_file import (
    MAX_LINE_BYTES,
    Record,
    parse_record,
    read_backwards,
    read_lines,
)

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
LOAD_NAME = "expert_load.jsonl"
SATURATION_NAME = "router_saturation.jsonl"
EVENTS_NAME = "events.jsonl"
ENDED_NAME = "ended.json"
PROFILE_NAME = "profile"
LOAD_TITLES = {"load": "expert load", "moa_load": "attention expert load"}
"""What a record of `expert_load.jsonl` can hold, by name."""

_BLOCK_BYTES = 1 << 16
_REMEMBERED_BYTES = 4096
_TOO_LARGE = 1 << 53


def profile_directory(directory: Path, rank: int) -> Path:
    """Return where a rank's profile goes."""
    return directory / PROFILE_NAME / f"rank{rank}"


def check_run(directory: Path, *, given_as: str) -> None:
    """Check that a directory holds a run.

    Args:
        directory: the directory.
        given_as: the flag or argument that names it, for the error.

    Raises:
        ConfigError: it holds no run.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{directory} holds no {CONFIG_NAME}; {given_as} must be the --save directory of a run;"
            " check the path"
        )


def read_settings(directory: Path) -> dict[str, str]:
    """Read every setting of a run as text, also those that this version does not know.

    Raises:
        ConfigError: the file is not a recipe.
    """
    settings = {}
    for key, value in recipe_nodes(str(directory / CONFIG_NAME)):
        settings[str(key.value)] = _as_text(value)
    return settings


def _as_text(node: yaml.Node) -> str:
    """Return a scalar as it is written, anything else as YAML in one line."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper, width=1 << 30)).strip()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Holds what `ended.json` says."""

    reason: str
    """`finished`, `signal`, `duration`, `interval` or `error`; `unknown` if it cannot be read."""
    detail: str
    """The same in words; may be empty."""
    requeue: bool
    """Whether the run should be started again."""
    time: str
    """When, in UTC; may be empty."""

    def __str__(self) -> str:
        """Return reason and detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def read_ended(directory: Path) -> Ended | None:
    """Read how the last run in a directory ended; None while it goes on, or if it was killed."""
    try:
        said = json.loads(read_small(directory / ENDED_NAME, most_bytes=_BLOCK_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("reason"), str):
        detail = f"{ENDED_NAME} cannot be read"
        return Ended(reason="unknown", detail=detail, requeue=False, time="")
    return Ended(
        reason=said["reason"],
        detail=str(said.get("detail") or ""),
        requeue=said.get("requeue") is True,
        time=str(said.get("time") or ""),
    )


def last_sign(directory: Path) -> float:
    """Return when anything in a run directory was last written, in seconds since 1970."""
    times = [directory.stat().st_mtime]
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                times.append(entry.stat(follow_symlinks=False).st_mtime)
            except FileNotFoundError:  # renamed since it was listed
                continue
    return max(times)


class RecordTail:
    """Follows a file of records that grows, and that a resumed run cuts or replaces.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable = 0
        """Lines since the start that are no records."""
        self._position = 0
        self._last_read = b""

    def read_new(self) -> tuple[bool, Iterator[Record]]:
        """Read the records of the lines that were finished since the last call.

        Returns:
            Whether they start over, because what was read before is no longer what the file begins
            with, and the records.
        """
        try:
            file = open(open_regular(self.path), "rb")
        except FileNotFoundError:
            starts_over = self._position > 0
            self._start_over()
            return starts_over, iter(())
        starts_over = not self._continues(file)
        if starts_over:
            self._start_over()
        file.seek(self._position)
        return starts_over, self._read(file)

    def _continues(self, file: BinaryIO) -> bool:
        """Return whether the file still holds what was read; it may be cut and have grown again."""
        file.seek(self._position - len(self._last_read))
        return file.read(len(self._last_read)) == self._last_read

    def _start_over(self) -> None:
        self._position = 0
        self._last_read = b""
        self.unreadable = 0

    def _read(self, file: BinaryIO) -> Iterator[Record]:
        with file:
            for line in read_lines(file):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return  # half written; the next call reads it again
                self._position += len(line)
                self._last_read = line[-_REMEMBERED_BYTES:]
                record = _parse(line)
                if record is None:
                    self.unreadable += 1
                else:
                    yield record


def last_record(path: Path) -> dict[str, Any] | None:
    """Find the last record of a file of any length; None without one."""
    try:
        file = open(open_regular(path), "rb")
    except FileNotFoundError:
        return None
    with file:
        records = (record for _, record in read_backwards(file))
        return next((record for record in records if _is_countable(record)), None)


def sample_records(path: Path, count: int) -> tuple[list[dict[str, Any]], int]:
    """Read records spread evenly over a file, the first and the last among them.

    Returns:
        At most `count` (2 or more) records, and how many lines the file has.
    """
    try:
        file = open(open_regular(path), "rb")
    except FileNotFoundError:
        return [], 0
    with file:
        total = sum(line.endswith(b"\n") for line in read_lines(file))
        wanted = set(spread(total, count))
        file.seek(0)
        lines = [line for number, line in enumerate(read_lines(file)) if number in wanted]
    records = (_parse(line) for line in lines)
    return [record for record in records if record is not None], total


def _parse(line: bytes) -> dict[str, Any] | None:
    record = parse_record(line)
    return record if record is not None and _is_countable(record) else None


def _is_countable(record: Record) -> bool:
    """Return whether a float can hold the record's iteration exactly."""
    return abs(record["iteration"]) < _TOO_LARGE


def loads_of(record: Record) -> dict[str, list[list[float]]]:
    """Return the [layers][experts] loads of a record, by the names in `LOAD_TITLES`."""
    return {key: record[key] for key in LOAD_TITLES if _is_matrix(record.get(key))}


def _is_matrix(rows: Any) -> bool:
    """Return whether this is a list of lists of numbers, all of one length and none empty."""
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)
        and all(isinstance(x, int | float) and abs(x) < _TOO_LARGE for row in rows for x in row)
    )


def spread(total: int, count: int) -> list[int]:
    """Select at most `count` numbers below `total`, evenly spaced, with the first and the last."""
    if total <= count:
        return list(range(total))
    return [index * (total - 1) // (count - 1) for index in range(count)]


def run_names(directories: Sequence[Path]) -> list[str]:
    """Name runs by the last parts of their paths, as many as tell them apart.

    Raises:
        ConfigError: two are the same.
    """
    parts = [directory.resolve().parts for directory in directories]
    for number, each in enumerate(parts):
        if each in parts[:number]:
            raise ConfigError(
                f"{directories[number]} is given twice; every run has a line of its own; drop one"
            )
    names = []
    for each in parts:
        length = 1
        while sum(other[-length:] == each[-length:] for other in parts) > 1:
            length += 1
        # A file name may be any bytes.
        names.append(os.fsencode("/".join(each[-length:])).decode(errors="replace"))
    return names
