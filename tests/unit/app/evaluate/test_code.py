"""Score small problems in the form of HumanEval and MBPP, whose right answers are known."""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.errors import ConfigError, DataError
from moe_app.evaluate.coding.problems import CODE_TASKS, read_humaneval, read_mbpp
from moe_app.evaluate.coding.scoring import pass_at_k, score_problems
from moe_app.evaluate.execution import prison
from moe_app.evaluate.execution.prison import ProgramLimits
from moe_app.evaluate.execution.sandbox import Sandbox
from moe_app.evaluate.harness.code_run import evaluate_code

# From the packages of the harness.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HUMANEVAL: list[dict[str, Any]] = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'from typing import List\n\n\ndef last(xs: List) -> int:\n    """The last."""\n',
        "entry_point": "last",
        "canonical_solution": "    return xs[-1]\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 2\n",
    },
]
MBPP: list[dict[str, Any]] = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\n    return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in (0, 1, 5)],
        "test_setup_code": "import math" if number == 11 else "",
        "challenge_test_list": [],
    }
    for number in (2, 3, 4, 11, 12)
]


def write_data(root: Path) -> Path:
    files = {
        "openai--openai_humaneval/default/test": HUMANEVAL,
        "google-research-datasets--mbpp/full/test": MBPP[3:],
        "google-research-datasets--mbpp/full/prompt": MBPP[:3],
    }
    for name, records in files.items():
        path = root / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


class FakeModel:
    """Stands for the model: says what it was told to, and remembers what it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.settings: list[Mapping[str, Any]] = []
        self.prompts: list[str] = []

    def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        return [ord(character) for character in text]

    def cut_prompt(self, ids: Sequence[int], settings: Mapping[str, Any]) -> tuple[str, Any]:
        self.settings.append(settings)
        return "".join(map(chr, ids)), None

    def continue_prompts(self, prompts: Sequence[tuple[str, Any]]) -> list[str]:
        self.prompts += [text for text, _ in prompts]
        return [self.texts.pop(0) for _ in prompts]


class FakeConversations:
    """Stands for the template."""

    def encode_user(self, text: str) -> list[int]:
        return [ord(character) for character in f"<user>{text}<assistant>"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what scores tasks with a model that writes given texts."""
    monkeypatch.setattr(prison, "program_users", lambda: None)
    data = write_data(tmp_path / "data")

    def evaluate(
        names: list[str], texts: Sequence[str], *, num_samples: int = 1, chat: Any = None
    ) -> tuple[dict[str, dict[str, Any]], FakeModel, dict[str, list[dict[str, Any]]]]:
        args = argparse.Namespace(
            output=str(tmp_path),
            task_data=str(data),
            limit=None,
            gen_kwargs="max_gen_toks=99",
            unsafe_execution="limits",
            execution_timeout=600,
            execution_workers=2,
        )
        model: Any = FakeModel(texts)
        results = evaluate_code(model, names, args, chat, num_samples=num_samples)
        samples = {
            name: list(
                map(json.loads, (tmp_path / f"samples_{name}.jsonl").read_text().splitlines())
            )
            for name in names
        }
        return results, model, samples

    return evaluate


def test_solutions_pass_and_others_do_not(run: Any) -> None:
    texts = [HUMANEVAL[0]["canonical_solution"], "    return xs[0]\n", "def add(x): return x", ""]
    texts[3] = str(MBPP[4]["code"])
    results, model, samples = run(["humaneval", "mbpp"], texts)
    assert results["humaneval"]["pass@1,none"] == results["mbpp"]["pass@1,none"] == 0.5
    assert [each["passed"] for each in samples["humaneval"]] == [[True], [False]]
    assert [each["passed"] for each in samples["mbpp"]] == [[False], [True]]
    assert samples["humaneval"][1]["errors"] == ["AssertionError: "]
    assert model.prompts[:2] == [each["prompt"] for each in HUMANEVAL]
    assert model.prompts[2].startswith(
        "You are an expert Python programmer, and here is your task: Write a function to add 2."
        " Your code should pass these tests:\n\nassert add(0) == 2\nassert add(1) == 3\n"
        "assert add(5) == 7\n[BEGIN]\ndef add(x):\n    return x + 2\n[DONE]\n\nYou are"
    )
    assert model.prompts[2].endswith("assert add(5) == 16\n[BEGIN]\n")
    assert model.settings[0]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert model.settings[2] == {"until": ["[DONE]"], "max_gen_toks": 99}


def test_every_solution_passes_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    problems = [*read_humaneval(HUMANEVAL, (), False), *read_mbpp(MBPP[3:], MBPP[:3], False)]
    solutions = [
        str(each.get("canonical_solution") or each["code"]) for each in HUMANEVAL + MBPP[3:]
    ]
    programs = [each.program(text) for each, text in zip(problems, solutions, strict=True)]
    assert programs[2].startswith("import math\ndef add")
    sandbox = Sandbox("limits", limits=ProgramLimits(seconds=600), workers=2)
    assert [each.passed for each in sandbox.run_all(programs)] == [True] * 4
    others = [each.program("    return None\n") for each in problems]
    assert [each.passed for each in sandbox.run_all(others)] == [False] * 4


def test_several_draws_give_pass_at_k_and_are_not_run_again(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [str(each["canonical_solution"]) for each in HUMANEVAL]
    texts = [right[0], *["    pass"] * 9, *[right[1]] * 10]
    results, model, samples = run(["humaneval"], texts, num_samples=10)
    assert results["humaneval"]["pass@1,none"] == pytest.approx((0.1 + 1.0) / 2)
    assert results["humaneval"]["pass@10,none"] == 1.0
    assert model.settings[0]["temperature"] == 0.8
    assert model.settings[0]["top_p"] == 0.95
    assert [sum(each["passed"]) for each in samples["humaneval"]] == [1, 10]

    def nothing(self: Sandbox, programs: Any) -> Any:
        yield from (pytest.fail("a program is run again") for _ in programs)

    monkeypatch.setattr(Sandbox, "run_all", nothing)
    assert run(["humaneval"], texts, num_samples=10)[0] == results


def test_problems_are_asked_in_conversations(run: Any) -> None:
    texts = [str(each["canonical_solution"]) for each in HUMANEVAL]
    results, model, _ = run(["humaneval"], texts, chat=FakeConversations())
    assert results["humaneval"]["pass@1,none"] == 1.0
    prompt = HUMANEVAL[0]["prompt"]
    assert model.prompts[0] == (
        f"<user>Complete the following Python function.\n\n```python\n{prompt}```<assistant>"
        f"Here is the function:\n\n```python\n{prompt}"
    )
    assert model.settings[0]["until"][-1] == "\n```"


def test_pass_at_k_is_the_share_of_choices_with_one_that_passed() -> None:
    for samples, passed, k in [(5, 2, 1), (5, 2, 3), (6, 3, 3), (4, 0, 2), (4, 4, 4), (5, 3, 3)]:
        ran = [True] * passed + [False] * (samples - passed)
        choices = list(itertools.combinations(ran, k))
        share = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(samples, passed, k) == pytest.approx(share)
    # 1 - C(18, 10) / C(20, 10) = 1 - 43758 / 184756
    assert pass_at_k(20, 2, 10) == pytest.approx(0.7631578947)


def test_standard_error_is_that_of_the_mean() -> None:
    # Per problem 1, 0, 0.5: mean 0.5, variance 0.25.
    found = score_problems([[True, True], [False, False], [True, False]])
    assert found == {
        "pass@1,none": pytest.approx(0.5),
        "pass@1_stderr,none": pytest.approx((0.25 / 3) ** 0.5),
    }


@pytest.mark.parametrize(
    ("name", "records", "examples", "message"),
    [
        ("humaneval", [{"task_id": "HumanEval/0"}], [], "record 1: 'prompt' is None; it must be"),
        ("mbpp", MBPP[3:], MBPP[:2], "MBPP lacks task 4 in its split 'prompt'"),
        ("mbpp", [{**MBPP[3], "test_list": []}], MBPP[:3], "MBPP, task 11: 'test_list' must be"),
    ],
)
def test_bad_records_are_named(name: str, records: Any, examples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CODE_TASKS[name].read(records, examples, False)


def test_data_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prison, "program_users", lambda: None)
    args = argparse.Namespace(
        output=str(tmp_path),
        task_data=None,
        unsafe_execution="limits",
        execution_timeout=600,
        execution_workers=1,
    )
    model: Any = FakeModel([])
    with pytest.raises(ConfigError, match="humaneval is read from files alone; name the directory"):
        evaluate_code(model, ["humaneval"], args, None, num_samples=1)
