"""Scores MT-Bench: two turns of 80 conversations, each answer rated from 1 to 10 by a judge.

Temperatures, the categories whose judge sees a reference, and the form of a rating are FastChat's
(Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023); the judge's
instructions say the same in other words.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.trainer.errors import DataError
from moe_app.evaluate.judging.endpoint import Messages

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of the model's answers, by category."""
OTHER_TEMPERATURE = 0.7
"""Of other categories."""
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a right answer."""
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]|\[(\d+\.?\d*)\]")
"""What a judgement is read by."""

_SYSTEM = "You judge fairly how good the answers of an AI assistant are."
_RULE = (
    "Consider how helpful, relevant, accurate, thorough, creative and detailed it is. Begin with a"
    " short explanation, and be as objective as you can. Then rate the answer on a scale of 1 to 10"
    ' strictly in this form: "[[rating]]", for example: "Rating: [[5]]".'
)
_REFERENCE_RULE = (
    "Consider whether it is correct and helpful. You are given a reference answer: compare, find"
    " mistakes and name them. Then rate the answer on a scale of 1 to 10 strictly in this form:"
    ' "[[rating]]", for example: "Rating: [[5]]".'
)


@dataclass(frozen=True, kw_only=True)
class MtQuestion:
    """Holds a conversation to have."""

    question_id: int
    category: str
    turns: tuple[str, str]
    """What the user says."""
    reference: tuple[str, str] | None
    """Right answers, where the judge sees them."""

    @property
    def temperature(self) -> float:
        """Return the temperature of the answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


def read_questions(
    records: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> list[MtQuestion]:
    """Return questions as FastChat publishes them, with its file of reference answers.

    Raises:
        DataError: a record is of another form, or a reference is not there.
    """
    answers = {each.get("question_id"): _reference_turns(each) for each in references}
    found = []
    for number, record in enumerate(records, start=1):
        question_id, category = record.get("question_id"), record.get("category")
        turns = _pair(record.get("turns"))
        if not isinstance(question_id, int) or not isinstance(category, str) or turns is None:
            raise DataError(
                f"MT-Bench, question {number}: it must have 'question_id' (a number), 'category'"
                " and 'turns' (two texts); take FastChat's question.jsonl"
            )
        reference = answers.get(question_id) if category in WITH_REFERENCE else None
        if reference is None and category in WITH_REFERENCE:
            raise DataError(
                f"MT-Bench, question {question_id}: the category {category} is judged by a"
                " reference answer of two turns, which is not there; put FastChat's"
                " reference_answer/gpt-4.jsonl beside question.jsonl"
            )
        found.append(
            MtQuestion(question_id=question_id, category=category, turns=turns, reference=reference)
        )
    return found


def _reference_turns(record: Mapping[str, Any]) -> tuple[str, str] | None:
    try:
        return _pair(record["choices"][0]["turns"])
    except (LookupError, TypeError):
        return None


def _pair(value: object) -> tuple[str, str] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value):
        return value[0], value[1]
    return None


def first_turn_judged(question: MtQuestion, answers: tuple[str, str]) -> Messages:
    """Return what the judge reads of the first turn."""
    rule, reference = _RULE, ""
    if question.reference is not None:
        rule = _REFERENCE_RULE
        reference = _block("Reference Answer", question.reference[0])
    return _messages(
        f"Rate the answer of an AI assistant to the user's question below. {rule}\n\n"
        f"[Question]\n{question.turns[0]}\n\n{reference}{_block('Answer', answers[0])}"
    )


def second_turn_judged(question: MtQuestion, answers: tuple[str, str]) -> Messages:
    """Return what the judge reads of the second turn: the whole conversation."""
    rule, reference = _RULE, ""
    if question.reference is not None:
        rule = _REFERENCE_RULE
        reference = _block("Reference Answers", _dialogue(question.turns, question.reference))
    return _messages(
        "Rate the answer of an AI assistant to the user's second question in the conversation"
        f" below. {rule}\n\n{reference}"
        f"{_block('Conversation', _dialogue(question.turns, answers))}"
    )


def _dialogue(turns: tuple[str, str], answers: tuple[str, str]) -> str:
    said = [
        f"### User:\n{turn}\n\n### Assistant:\n{answer}"
        for turn, answer in zip(turns, answers, strict=True)
    ]
    return "\n\n".join(said)


def _block(name: str, text: str) -> str:
    return f"[The Start of {name}]\n{text}\n[The End of {name}]\n\n"


def _messages(text: str) -> Messages:
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text.rstrip()}]


def rating(verdict: str | None) -> float | None:
    """Return the rating that a judge gave; None where it gave none from 1 to 10."""
    value = float("nan") if verdict is None else float(verdict)
    return value if 1 <= value <= 10 else None


def mt_bench_scores(
    categories: Sequence[str], ratings: Sequence[tuple[float | None, float | None]]
) -> dict[str, float]:
    """Return mean ratings: of all answers, of each turn, of each category.

    Args:
        categories: of each question.
        ratings: of its two turns; None is left out, and counted.
    """
    groups: dict[str, list[float]] = {"score": [], "turn_1": [], "turn_2": []}
    missing = 0
    for category, pair in zip(categories, ratings, strict=True):
        for turn, value in enumerate(pair, start=1):
            if value is None:
                missing += 1
                continue
            for name in ("score", f"turn_{turn}", category):
                groups.setdefault(name, []).append(value)
    means = {
        f"{name},none": math.fsum(values) / len(values) for name, values in groups.items() if values
    }
    return {**means, "unread,none": missing}
