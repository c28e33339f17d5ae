"""Reads the rows of conversation files, and counts those that are none."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.trainer.errors import DataError
from megatron.trainer.io.bounded_read import read_small
from moe_app.chat.chat_config import ChatDataConfig
from moe_app.chat.chat_rows import MOST_ROW_BYTES, Unit, read_unit
from moe_app.chat.dialogue import ChatKind
from moe_app.data.sources import SourceFile, find_sources
from moe_app.filter.records import read_rows

logger = logging.getLogger(__name__)

_SHOWN = 5
_MOST_CHARACTERS = 1000
"""Of what is wrong with a row."""
_MOST_STATE_BYTES = 1 << 20


class BadRows:
    """Counts rows that hold no conversation, and refuses too many.

    Args:
        most: How many may be skipped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.count = 0
        """Rows so far."""
        self.shown: list[str] = []
        """What is wrong with the first of them."""

    def add(self, problem: str) -> None:
        """Count a row.

        Raises:
            DataError: There are more than may be skipped.
        """
        self.count += 1
        if len(problem) > _MOST_CHARACTERS:  # it quotes a row
            problem = f"{problem[:_MOST_CHARACTERS]}..."
        if len(self.shown) < _SHOWN:
            self.shown.append(problem)
            if self.count <= self._most:
                logger.warning("skipped: %s", problem)
        check_bad_rows(self.count, self._most, self.shown)


def check_bad_rows(count: int, most: int, shown: Sequence[str]) -> None:
    """Refuse more bad rows than may be skipped.

    Raises:
        DataError: There are.
    """
    if count > most:
        also = "; before it: " + "; ".join(shown[:-1]) if len(shown) > 1 else ""
        raise DataError(
            f"{shown[-1] if shown else 'a row holds no conversation'}; {count} row(s) hold no"
            f" conversation, --max-bad-rows {most} may; mend them, or let more be skipped{also}"
        )


def find_chat_files(inputs: Sequence[str], *, flag: str) -> list[SourceFile]:
    """Return the files that inputs name.

    Args:
        inputs: Files, folders, patterns, directories of `Dataset.save_to_disk`.
        flag: What names them, for messages.

    Raises:
        DataError: One cannot be read, or is a dataset of several splits.
    """
    for each in inputs:
        splits = Path(each) / "dataset_dict.json"
        if splits.is_file():
            names = _split_names(splits)
            if len(names) != 1:
                raise DataError(
                    f"{flag} {each} is a dataset of the splits {', '.join(names)}; only one is"
                    f" meant; name its folder, as {Path(each) / (names[0] if names else 'train')}"
                )
    return find_sources(inputs, flag=flag)


def _split_names(path: Path) -> list[str]:
    try:
        names = json.loads(read_small(path, most_bytes=_MOST_STATE_BYTES)).get("splits")
        return [str(each) for each in names]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} does not list the splits of a dataset ({error}); save the dataset again"
        ) from error


def read_units(
    files: Sequence[SourceFile], kind: ChatKind, cfg: ChatDataConfig, bad: BadRows
) -> Iterator[tuple[str, Unit]]:
    """Yield where each row is, and what it holds.

    Raises:
        DataError: A file cannot be read, or there are too many bad rows.
    """
    for where, unit in read_each(files, kind, cfg):
        if isinstance(unit, str):
            bad.add(unit)
        else:
            yield where, unit


def read_each(
    files: Sequence[SourceFile], kind: ChatKind, cfg: ChatDataConfig
) -> Iterator[tuple[str, Unit | str]]:
    """Yield where each row is, and what it holds, or what is wrong with it.

    Raises:
        DataError: A file cannot be read.
    """
    for file in files:
        unit_name = "line" if file.kind == "jsonl" else "row"
        for number, _, value in read_rows(file, most_line_bytes=MOST_ROW_BYTES):
            where = f"{file.path}, {unit_name} {number}"
            if isinstance(value, str):
                yield where, value
                continue
            try:
                unit = read_unit(value, kind, cfg)
            except DataError as error:
                yield where, f"{where}: {error}"
            else:
                yield where, unit
