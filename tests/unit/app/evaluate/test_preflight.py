"""What a suite lacks is told before the model answers anything."""

import argparse
import json
from pathlib import Path
from typing import Any

import nltk
import pytest
from lm_eval.api.group import Group
from lm_eval.api.task import Task

from megatron.trainer.errors import UserError
from moe_app.evaluate.harness import run
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.harness.own_run import check_own
from moe_app.evaluate.harness.preflight import load_tasks
from moe_app.evaluate.harness.task_search import find_tasks
from moe_app.evaluate.suites import Suite

# From the packages of the harness.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LENGTH = 40


@pytest.fixture
def model() -> HarnessModel:
    """Make a model of a known length, which cannot answer."""
    nothing: Any = None
    return HarnessModel(
        nothing,
        nothing,
        nothing,
        max_length=LENGTH,
        max_gen_toks=8,
        prefix_token_id=0,
        seed=1,
    )


def write_task(folder: Path, name: str, *, data: str = "docs", tokens: int = 8) -> None:
    (folder / "docs.jsonl").write_text(json.dumps({"q": "fox", "a": "dog"}) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{data}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": tokens},
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    given = {"gen_kwargs": None, "num_fewshot": None, "limit": None, "template": None}
    more = {"bootstrap_iters": 0, "seed": 1, "task_data": None, "output": str(folder)}
    return argparse.Namespace(include_path=[str(folder)], **{**given, **more, **changes})


DRAWN = """
import random

import datasets
import numpy as np
import torch


def draw(metadata=None, **_):
    q = f"{random.random()} {np.random.rand()} {torch.rand(1).item()}"
    return {"test": datasets.Dataset.from_list([{"q": q, "a": "dog"}])}
"""


@pytest.mark.usefixtures("few_tasks")
def test_what_a_task_draws_follows_from_the_seed(model: HarnessModel, tmp_path: Path) -> None:
    """Whatever was drawn before, and whatever tasks are loaded beside it."""
    write_task(tmp_path, "good")
    (tmp_path / "drawn.py").write_text(DRAWN)
    text = "include: good.yaml\ntask: drawn{}\ncustom_dataset: !function drawn.draw\n"
    for end in ("", "_too"):
        (tmp_path / f"drawn{end}.yaml").write_text(text.format(end))

    def question(*tasks: str, seed: int) -> str:
        manager = find_tasks([str(tmp_path)], tasks)
        loaded = load_tasks(model, manager, tasks, None, seed=seed)
        (task,) = loaded["drawn"]
        assert isinstance(task, Task)
        drawn: str = task.dataset["test"][0]["q"]
        return drawn

    first = question("drawn", seed=1)
    assert question("good", "drawn_too", "drawn", seed=1) == first
    assert set(first.split()).isdisjoint(question("drawn", seed=2).split())


def evaluated(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, folder: Path, last: str, **changes: Any
) -> list[Any]:
    """Evaluate a good task, then another with a limit of its own; return what the harness ran."""
    write_task(folder, "good")
    ran: list[Any] = []

    def evaluate(*, tasks: list[Task | Group], **_: Any) -> dict[str, Any]:
        # Names would be loaded a second time.
        ran.append([each.name if isinstance(each, Group) else each.task_name for each in tasks])
        return {"config": {}, "samples": {}}

    monkeypatch.setattr(run.lm_eval, "simple_evaluate", evaluate)
    suite = Suite(tasks=("good", last), limits={last: 3})
    try:
        run.evaluate_suite(model, suite, arguments(folder, **changes), {})
    except UserError as error:
        ran.append(str(error))
    return ran


def test_task_without_its_data_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "bare", data="absent")
    (error,) = evaluated(monkeypatch, model, tmp_path, "bare")
    assert "could not evaluate bare: FileNotFoundError" in error


def test_task_without_its_package_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "base")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    text = "include: base.yaml\ntask: lacking\nprocess_results: !function needs.score\n"
    (tmp_path / "lacking.yaml").write_text(text)
    (error,) = evaluated(monkeypatch, model, tmp_path, "lacking")
    assert error.startswith("lacking: a task imports the package 'no_such_package'")


def test_answers_that_do_not_fit_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "long", tokens=LENGTH)
    (error,) = evaluated(monkeypatch, model, tmp_path, "long")
    assert error.startswith(f"long: a task asks for {LENGTH} new tokens, but the model has")
    asked = evaluated(monkeypatch, model, tmp_path, "long", gen_kwargs="max_gen_toks=9")
    assert asked == [["good"], ["long"]]


@pytest.mark.usefixtures("few_tasks")
def test_groups_and_tags_are_handed_over_as_they_were_loaded(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_task(tmp_path, name)
        task = json.loads((tmp_path / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**task, "tag": "tagged"}))
    group = {"group": "grouped", "task": ["one", "two"]}
    (tmp_path / "grouped.yaml").write_text(json.dumps(group))
    assert evaluated(monkeypatch, model, tmp_path, "grouped") == [["good"], ["grouped"]]
    _, found = evaluated(monkeypatch, model, tmp_path, "tagged")
    assert sorted(found) == ["one", "two"]


def test_ifeval_needs_what_splits_sentences(
    monkeypatch: pytest.MonkeyPatch, model: HarnessModel, tmp_path: Path
) -> None:
    write_task(tmp_path, "my_ifeval")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (error,) = evaluated(monkeypatch, model, tmp_path, "my_ifeval")
    assert error.startswith("my_ifeval splits sentences with nltk's data 'punkt_tab'")
    (tmp_path / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
    assert evaluated(monkeypatch, model, tmp_path, "my_ifeval") == [["good"], ["my_ifeval"]]


@pytest.mark.parametrize("name", ["mt_bench", "alpaca_eval", "xstest"])
def test_judged_tasks_need_data_and_room(model: HarnessModel, tmp_path: Path, name: str) -> None:
    records: dict[str, dict[str, Any]] = {
        "mt_bench/question": {"question_id": 1, "category": "writing", "turns": ["a", "b"]},
        "tatsu-lab--alpaca_eval/alpaca_eval/eval": {"instruction": "Go.", "output": "Gone."},
        "walledai--XSTest/default/test": {"prompt": "Kill time?", "type": "homonyms"},
    }
    suite, args = Suite(tasks=(), own=(name,)), arguments(tmp_path, task_data=str(tmp_path))
    with pytest.raises(UserError, match=r"question.jsonl is not there|has no .parquet"):
        check_own(model, suite, args)
    for path, record in records.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{name}: a task asks for .* max_gen_toks"):
        check_own(model, suite, args)
    args.gen_kwargs = "max_gen_toks=9"
    check_own(model, suite, args)
