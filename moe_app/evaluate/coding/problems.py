"""Reads HumanEval and MBPP, and makes programs of what a model wrote.

Fields are those of the published files. Prompts, texts that end a completion and examples are those
of the papers: Chen et al., "Evaluating Large Language Models Trained on Code" (2021), and Austin et
al., "Program Synthesis with Large Language Models" (2021).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.trainer.errors import DataError

Record = Mapping[str, Any]

_HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = "\n```"
_MBPP_STOPS = ("[DONE]",)
_MBPP_EXAMPLES = (2, 3, 4)
"""Tasks of the split `prompt` that the paper shows before each question."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Holds a task for a programmer."""

    task_id: str
    """As it was published."""
    prompt: str
    """What a model continues; in a conversation, what the user asks."""
    answer_begins: str
    """In a conversation, how the model's answer is made to begin."""
    stops: tuple[str, ...]
    """Texts that end a completion."""
    before: str
    """Stands before the completion in the program."""
    tests: str
    """Stands after it; raises an exception unless the completion is right."""

    def program(self, completion: str) -> str:
        """Return the program that ends well if the completion is right."""
        return f"{self.before}{completion}\n{self.tests}\n"


@dataclass(frozen=True, kw_only=True)
class CodeTask:
    """Says where problems are, and how they are read."""

    dataset: str
    """Id on the Hub."""
    config: str | None
    """Configuration of the dataset."""
    split: str
    """The problems."""
    examples_split: str | None
    """Problems with their solutions, which a prompt shows; None for a task without."""
    read: Callable[[Sequence[Record], Sequence[Record], bool], list[Problem]]
    """Makes problems of records, of those with solutions, and for conversations or not."""


def read_humaneval(
    records: Sequence[Record], examples: Sequence[Record], is_chat: bool
) -> list[Problem]:
    """Return the problems of HumanEval.

    Raises:
        DataError: a record lacks a field.
    """
    found = []
    for number, record in enumerate(records, start=1):
        task_id, prompt, entry, test = _texts(
            record, ("task_id", "prompt", "entry_point", "test"), f"HumanEval, record {number}"
        )
        asked = f"Complete the following Python function.\n\n```python\n{prompt}```"
        found.append(
            Problem(
                task_id=task_id,
                prompt=asked if is_chat else prompt,
                answer_begins=f"Here is the function:\n\n```python\n{prompt}",
                stops=(*_HUMANEVAL_STOPS, _FENCE) if is_chat else _HUMANEVAL_STOPS,
                before=prompt,
                tests=f"{test}\ncheck({entry})",
            )
        )
    return found


def read_mbpp(
    records: Sequence[Record], examples: Sequence[Record], is_chat: bool
) -> list[Problem]:
    """Return the problems of MBPP, after three examples.

    Raises:
        DataError: a record lacks a field, or an example is not there.
    """
    solved = {int(record.get("task_id", 0)): record for record in examples}
    missing = [number for number in _MBPP_EXAMPLES if number not in solved]
    if missing:
        raise DataError(
            f"MBPP lacks task {missing[0]} in its split 'prompt'; tasks 2, 3 and 4 are shown before"
            " each question; put prompt.jsonl or prompt.parquet beside the split 'test'"
        )
    shots = ""
    for example in _MBPP_EXAMPLES:
        (code,) = _texts(solved[example], ("code",), f"MBPP, task {example}")
        shots += f"{_mbpp_question(solved[example], example)}[BEGIN]\n{code}\n[DONE]\n\n"
    found = []
    for record in records:
        number = record.get("task_id")
        question = shots + _mbpp_question(record, number)
        setup = record.get("test_setup_code") or ""
        found.append(
            Problem(
                task_id=str(number),
                prompt=question if is_chat else f"{question}[BEGIN]\n",
                answer_begins="[BEGIN]\n",
                stops=_MBPP_STOPS,
                before=f"{setup}\n" if setup else "",
                tests="\n".join(_tests(record, number)),
            )
        )
    return found


def _mbpp_question(record: Record, number: object) -> str:
    (text,) = _texts(record, ("text",), f"MBPP, task {number}")
    tests = "\n".join(_tests(record, number)[:3])
    return (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass"
        f" these tests:\n\n{tests}\n"
    )


def _tests(record: Record, number: object) -> list[str]:
    tests = record.get("test_list")
    if isinstance(tests, Iterable) and not isinstance(tests, str | bytes):
        found = list(tests)
        if found and all(isinstance(test, str) for test in found):
            return found
    raise DataError(
        f"MBPP, task {number}: 'test_list' must be a list of at least one text; fetch the file"
        " again"
    )


def _texts(record: Record, keys: Sequence[str], where: str) -> list[str]:
    for key in keys:
        if not isinstance(record.get(key), str):
            raise DataError(
                f"{where}: {key!r} is {record.get(key)!r:.80}; it must be a text; fetch the file"
                " again"
            )
    return [record[key] for key in keys]


CODE_TASKS: dict[str, CodeTask] = {
    "humaneval": CodeTask(
        dataset="openai/openai_humaneval",
        config=None,
        split="test",
        examples_split=None,
        read=read_humaneval,
    ),
    "mbpp": CodeTask(
        dataset="google-research-datasets/mbpp",
        config="full",
        split="test",
        examples_split="prompt",
        read=read_mbpp,
    ),
}
"""By the name that --tasks takes."""
