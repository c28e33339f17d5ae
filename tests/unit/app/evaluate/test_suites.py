"""Load the tasks of suites on a few records of each dataset, and read their requests."""

from collections.abc import Mapping
from typing import Any

import datasets
import pytest

from moe_app.evaluate.harness.task_data import stand_in
from moe_app.evaluate.harness.task_search import find_tasks
from moe_app.evaluate.suites import SUITES, Suite, named_suite

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LETTERS = {"text": ["up", "down"], "label": ["A", "B"]}
RECORDS: dict[str, dict[str, Any]] = {
    "allenai/ai2_arc": {"question": "Where?", "choices": LETTERS, "answerKey": "B"},
    "tau/commonsense_qa": {"question": "Where?", "choices": LETTERS, "answerKey": "B"},
    "allenai/openbookqa": {"question_stem": "It goes", "choices": LETTERS, "answerKey": "B"},
    "allenai/sciq": {
        "support": " Balls fall. ",
        "question": "Where?",
        **{f"distractor{n}": f"up{n}" for n in (1, 2, 3)},
        "correct_answer": "down",
    },
    "lighteval/siqa": {
        **{"context": "Kai let go.", "question": "What fell?"},
        **{"answerA": "it", "answerB": "Kai", "answerC": "both", "label": "1"},
    },
    "aps/super_glue": {
        **{"passage": "It fell.", "question": "did it fall", "label": 1},
        **{"premise": "It fell.", "choice1": "I let go.", "choice2": "I held it."},
    },
    "Rowan/hellaswag": {
        **{"activity_label": "Falling", "ctx_a": "It", "ctx_b": "falls"},
        **{"endings": ["down.", "up."], "label": "0"},
    },
    "baber/piqa": {"goal": "Drop it", "sol1": "let go", "sol2": "hold it", "label": 0},
    "allenai/winogrande": {
        **{"sentence": "The ball fell as _ was let go.", "option1": "the ball"},
        **{"option2": "the sky", "answer": "1"},
    },
    "cais/mmlu": {"question": "Where?", "choices": ["up", "down", "on", "off"], "answer": 1},
}
REQUESTS: dict[str, tuple[str, list[str], int]] = {
    "olmoe_during_arc_challenge": ("Question: Where?\nAnswer:", ["up", "down"], 1),
    "olmoe_during_arc_easy": ("Question: Where?\nAnswer:", ["up", "down"], 1),
    "olmoe_during_csqa": ("Question: Where?\nAnswer:", ["up", "down"], 1),
    "olmoe_during_openbookqa": ("It goes", ["up", "down"], 1),
    "olmoe_during_sciq": (
        "Balls fall.\nQuestion: Where?\nAnswer:",
        ["up1", "up2", "up3", "down"],
        3,
    ),
    "olmoe_during_socialiqa": (
        "Question: Kai let go. What fell?\nAnswer:",
        ["it", "Kai", "both"],
        0,
    ),
    "mmlu_anatomy_continuation": (
        "Question: Where?\nAnswer:",
        ["up", "down", "on", "off"],
        1,
    ),
}


def load(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Return a dataset whose records say of which split they are."""
    record: Mapping[str, Any] = RECORDS[path]
    if path == "aps/super_glue" and name == "copa":
        record = {**record, "question": "cause"}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list([{**record, "split": split}] * number)
            for split, number in (("train", 1), ("dev", 6), ("validation", 2), ("test", 1))
        }
    )


@pytest.fixture(scope="module")
def manager() -> Any:
    """Every task of every suite, found together, because finding takes seconds."""
    return find_tasks([], [name for suite in SUITES.values() for name in suite.tasks])


def test_olmoe_during_asks_as_its_table_says(manager: Any) -> None:
    suite = SUITES["olmoe_during"]
    with stand_in(load):
        found = manager.load(list(suite.tasks))
    tasks = found["tasks"]
    assert len(tasks) == 11 + 2 * 57
    assert {doc["split"] for task in tasks.values() for doc in task.eval_docs} == {"validation"}
    for name, (context, choices, target) in REQUESTS.items():
        task = tasks[name]
        (doc, _) = task.eval_docs
        assert task.doc_to_text(doc) == context, name
        assert task.doc_to_choice(doc) == choices, name
        assert int(task.doc_to_target(doc)) == target, name
        assert {"acc", "acc_norm"} <= set(task.aggregation()), name
    letters = tasks["mmlu_anatomy"]
    assert letters.doc_to_text(next(iter(letters.eval_docs))).endswith("D. off\nAnswer:")
    assert set(found["groups"]) >= {"olmoe_during_mmlu", "olmoe_during_mmlu_var"}


def test_suites_name_tasks_of_the_harness(manager: Any) -> None:
    for suite in SUITES.values():
        assert all(manager.match_tasks([name]) == [name] for name in suite.tasks)
        assert {*suite.num_fewshot, *suite.limits} <= set(suite.tasks)


def test_a_task_that_is_named_twice_is_one() -> None:
    found = named_suite(["piqa", "humaneval", "piqa", "humaneval"])
    assert found == Suite(tasks=("piqa",), own=("humaneval",))
