"""Score OLMES items by hand, and read its files."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import DataError
from moe_app.evaluate.olmes import OLMES_TASKS, OlmesTask, score_items, task_score
from moe_app.tasks.olmes_requests import read_items

# After the question, and after "Answer:" alone; the second answer is right.
LOG_PROBS = {
    ("Q: 1\nAnswer:", " no"): -3.0,
    ("Q: 1\nAnswer:", " a longer one"): -6.0,
    ("Answer:", " no"): -1.0,
    ("Answer:", " a longer one"): -5.0,
    ("Q: 2\nAnswer:", " up"): -2.0,
    ("Q: 2\nAnswer:", " down"): -2.5,
    ("Answer:", " up"): -4.0,
    ("Answer:", " down"): -3.5,
}


def record(doc: int, index: int, context: str, continuation: str, label: Any = 1) -> dict[str, Any]:
    request = {"context": context, "continuation": continuation}
    return {"doc_id": doc, "idx": index, "request": request, "label": label}


def write(path: Path, records: Sequence[Any]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)
    return path


def items_file(path: Path) -> Path:
    asked = [("Q: 1\nAnswer:", (" no", " a longer one")), ("Q: 2\nAnswer:", (" up", " down"))]
    records = []
    for doc, (context, choices) in enumerate(asked):
        for index, choice in enumerate(choices):
            records.append(record(doc, index, context, choice))
            records.append(record(1_000_000 + doc, index, "Answer:", choice))
    return write(path, records)


def test_each_normalisation_chooses_as_by_hand(tmp_path: Path) -> None:
    """Item 1: -3 and -6; per character -3/3 and -6/13; PMI -2 and -1.

    Item 2: -2 and -2.5; per character -2/3 and -2.5/5; PMI 2 and 1.
    """
    items = read_items(items_file(tmp_path / "requests.jsonl.gz"))
    accuracies, records = score_items(items, lambda pairs: [LOG_PROBS[pair] for pair in pairs])
    assert [each["chosen"] for each in records] == [
        {"none": 0, "char": 1, "pmi": 1},
        {"none": 0, "char": 1, "pmi": 0},
    ]
    assert accuracies == {"none": 0.0, "char": 1.0, "pmi": 0.5}


def test_a_score_is_the_better_of_both_forms() -> None:
    cloze: Any = {"none": 0.9, "char": 0.2, "pmi": 0.4}
    letters: Any = {"none": 0.3, "char": 1.0}
    for norm, expected in (("none", 0.9), ("char", 0.3), ("pmi", 0.4)):
        task = OlmesTask(split="val", cloze=norm)  # type: ignore[arg-type]
        assert task_score(task, cloze, letters) == expected
    with pytest.raises(DataError, match="has no scores for 'pmi'"):
        task_score(OlmesTask(split="val", cloze="pmi"), letters, None)
    assert len(OLMES_TASKS) == 10


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no items; each item's label counts"),
        ([record(0, 0, "a", "b", label=4)], "has label 4 for item 0; each item's label"),
        ([record(0, 0, "a", "b", label="x")], "line 1: is no request for a log-probability"),
        ([[1]], "cannot be read as gzipped JSON Lines: is no object"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_items(write(tmp_path / "requests.jsonl.gz", records))


def test_a_file_that_is_not_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read as gzipped JSON Lines"):
        read_items(path)
