"""Evaluate what the harness asks in conversations, and what is scored without the harness."""

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe_app.evaluate.execution import prison
from tests.unit.app.evaluate.judge_stub import JudgeStub
from tests.unit.app.evaluate.make_evaluated import LENGTH, evaluate, write_model, write_tasks

# From the packages of the harness, from torch when it reads a checkpoint, and from megatron-core.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|endoftext|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both forms, and tasks."""
    where = tmp_path_factory.mktemp("own")
    write_tasks(where)
    write_model(where, "olmoe")
    return where


def test_programs_are_scored_beside_tasks_of_the_harness(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    data = tmp_path / "openai--openai_humaneval" / "default" / "test.jsonl"
    data.parent.mkdir(parents=True)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(candidate):\n    pass",
    }
    data.write_text(json.dumps(problem))
    more = ("--task-data", str(tmp_path), "--limit", "1", "--gen-kwargs", "max_gen_toks=5")
    code = ("--unsafe-execution", "limits", "--code-samples", "2", "--template", "zephyr")
    assert evaluate(folder, "olmoe", tmp_path, *more, *code, tasks="letters,humaneval") == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results.keys() == {"letters", "humaneval"}
    (sample,) = map(json.loads, (tmp_path / "samples_humaneval.jsonl").read_text().splitlines())
    assert len(set(sample["resps"][0])) == 2
    # What a random model writes is no Python.
    assert results["humaneval"]["pass@1,none"] == 0.0
    assert all(error.startswith("SyntaxError") for error in sample["errors"])
    assert sample["prompt"].startswith("Complete the following Python function.")


def test_tasks_are_asked_in_conversations_as_the_exported_model_is(
    folder: Path, tmp_path: Path
) -> None:
    tasks = ["letters", "words"]
    more = ("--template", "zephyr", "--num-fewshot", "1")
    assert evaluate(folder, "olmoe", tmp_path, *more, tasks=",".join(tasks)) == 0
    peer = HFLM(
        pretrained=str(folder / "olmoe"),
        device="cpu",
        dtype="float32",
        batch_size=1,
        max_length=LENGTH,
    )
    peer.tokenizer.chat_template = ZEPHYR
    expected = lm_eval.simple_evaluate(
        model=peer,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=False,
    )
    assert expected is not None
    for task in tasks:
        lines = (tmp_path / f"samples_{task}.jsonl").read_text().splitlines()
        mine = sorted(map(json.loads, lines), key=lambda item: item["doc_id"])
        theirs = sorted(expected["samples"][task], key=lambda item: item["doc_id"])
        for own_item, other in zip(mine, theirs, strict=True):
            prompt = own_item["arguments"]["gen_args_0"]["arg_0"]
            assert prompt == other["arguments"][0][0]
            assert prompt.startswith("<|user|>")
            answers = [answer[0] for answer in own_item["resps"]]
            others = [answer[0] for answer in other["resps"]]
            if task == "words":
                assert answers == others
            else:
                assert [float(each[0]) for each in answers] == pytest.approx(
                    [float(each[0]) for each in others], rel=1e-5
                )


def test_conversations_are_had_and_judged(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mt_bench" / "question.jsonl"
    path.parent.mkdir()
    question = {"question_id": 81, "category": "extraction", "turns": ["fox", "dog"]}
    path.write_text(json.dumps(question))
    common = ("--task-data", str(tmp_path), "--template", "zephyr", "--judge-model", "m")
    more = (*common, "--gen-kwargs", "max_gen_toks=3")
    stub = JudgeStub(rule=lambda text: "[[3]]" if "second" in text else "[[8]]")
    with stub.served() as url:
        done = evaluate(folder, "olmoe", tmp_path, *more, "--judge-url", url, tasks="mt_bench")
    assert done == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]["mt_bench"]
    assert (results["turn_1,none"], results["turn_2,none"]) == (8.0, 3.0)
    (sample,) = map(json.loads, (tmp_path / "samples_mt_bench.jsonl").read_text().splitlines())
    assert all(answer for (answer,) in sample["resps"])
    told = [each["messages"][-1]["content"] for each in stub.asked]
    assert all(sample["resps"][0][0] in text for text in told)


def test_what_is_scored_last_is_looked_for_first(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    judge = ("--judge-url", "http://localhost:1/v1", "--judge-model", "m", "--template", "zephyr")
    more = ("--task-data", str(tmp_path), *judge, "--gen-kwargs", "max_gen_toks=3")
    assert evaluate(folder, "olmoe", tmp_path, *more, tasks="letters,xstest") == 2
    assert "walledai--XSTest" in capfd.readouterr().err
    (kept,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert "checkpoint" in kept  # of which model answers would be, and no answer
