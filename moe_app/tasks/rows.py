"""Turns questions into rows of tokens, and the rows' log-probabilities into scores."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron.trainer.data.tokenizer import Tokenizer
from megatron.trainer.errors import DataError
from megatron.trainer.inference.scoring import Continuation
from moe_app.tasks.documents import DocumentRows
from moe_app.tasks.items import Task, TaskItem


@dataclass(frozen=True, kw_only=True)
class ItemRows:
    """Says which rows hold an item's choices, and what their scores are divided by."""

    first: int
    """Row of the first choice; the others follow."""
    gold: int
    """The right one among the choices."""
    chars: tuple[int, ...]
    """Characters of each choice."""
    num_bytes: tuple[int, ...]
    """UTF-8 bytes of each choice."""
    bare_first: int | None
    """Row of the first choice without the question; None for none."""


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """Holds all tasks of an evaluation as rows."""

    rows: tuple[Continuation, ...]
    """What the model computes."""
    tasks: dict[str, tuple[ItemRows, ...]]
    """The items of each task."""
    num_cut: int
    """Rows whose context was cut from the left to the model's length."""
    documents: Mapping[str, tuple[DocumentRows, ...]] = field(default_factory=dict)
    """Documents of each validation set, whose rows follow those of the tasks."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Holds the figures of one task."""

    accuracy: dict[str, float]
    """Share of items whose best choice is the right one: by the log-probability (`none`), by it per
    character (`char`) and per byte (`byte`), and less that without the question (`pmi`)."""
    bits_per_byte: float
    """Of the right choice, mean over items."""


def encode_tasks(tasks: Sequence[Task], tokenizer: Tokenizer, *, max_length: int) -> TaskRows:
    """Encode every choice of every item after its context.

    Args:
        tasks: the questions.
        tokenizer: of the model.
        max_length: positions of a row.

    Raises:
        DataError: a choice has no tokens of its own, or more than the model takes.
    """
    rows: list[Continuation] = []
    num_cut = 0

    def add(item: TaskItem, bare: str | None = None) -> int:
        nonlocal num_cut
        first = len(rows)
        for index, choice in enumerate(item.choices):
            own = item.context_of(index)
            context = own if bare is None else bare
            text = item.continuation(choice, own) if context else choice
            ids, count = encode_pair(tokenizer, context, text)
            if not 0 < count <= max_length:
                raise DataError(
                    f"{item.where}: choice {choice[:40]!r} has {count} tokens after its context;"
                    f" between 1 and {max_length} (--seq-length) can be scored; repair or remove"
                    " the line"
                )
            kept = ids[-(max_length + 1) :]
            num_cut += len(ids) > len(kept)
            rows.append(Continuation(ids=tuple(kept), count=count))
        return first

    encoded = {
        task.name: tuple(
            ItemRows(
                first=add(item),
                gold=item.gold,
                chars=tuple(len(each) for each in item.choices),
                num_bytes=tuple(len(each.encode()) for each in item.choices),
                bare_first=None if item.bare_context is None else add(item, item.bare_context),
            )
            for item in task.items
        )
        for task in tasks
    }
    return TaskRows(rows=tuple(rows), tasks=encoded, num_cut=num_cut)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Return the ids of a context and its continuation, and how many are the continuation's.

    As lm-evaluation-harness does it: both are encoded as one text, which the context's number of
    ids divides; spaces at the context's end belong to the continuation. A text without context
    follows the tokenizer's BOS, or the end of a document.
    """
    if not context:
        prefix = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eod
        ids = tokenizer.encode(continuation)
        return ([prefix, *ids], len(ids)) if ids[:1] != [prefix] else (ids, len(ids) - 1)
    bare = context.rstrip()
    before = tokenizer.encode_document(bare) if bare else []
    whole = tokenizer.encode_document(context + continuation)
    if not before:  # a context of spaces alone
        prefix = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eod
        whole = whole if whole[:1] == [prefix] else [prefix, *whole]
        return whole, len(whole) - 1
    return whole, len(whole) - len(before)


def score_task(items: Iterable[ItemRows], log_probs: Sequence[float]) -> TaskScore:
    """Score the items of a task; a figure that rests on a NaN is one.

    Args:
        items: of the task.
        log_probs: of all rows, nats.
    """
    right: dict[str, list[float]] = {}
    bits = []
    for item in items:
        stop = item.first + len(item.chars)
        values = np.array(log_probs[item.first : stop])
        scores = {
            "none": values,
            "char": values / np.array(item.chars),
            "byte": values / np.array(item.num_bytes),
        }
        if item.bare_first is not None:
            bare = log_probs[item.bare_first : item.bare_first + len(item.chars)]
            scores["pmi"] = values - np.array(bare)
        for name, each in scores.items():
            is_known = bool(np.isfinite(each).all())
            hit = float(each.argmax() == item.gold) if is_known else math.nan
            right.setdefault(name, []).append(hit)
        bits.append(-values[item.gold] / item.num_bytes[item.gold] / math.log(2))
    accuracy = {
        name: sum(hits) / len(hits)
        for name, hits in right.items()
        if len(hits) == len(bits)  # all items have such a score
    }
    return TaskScore(accuracy=accuracy, bits_per_byte=float(np.mean(bits)))
