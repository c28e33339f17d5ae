"""Lets a model answer in conversations, and a judge score the answers."""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.chat.dialogue import ASSISTANT, Turn
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.harness.preflight import check_room
from moe_app.evaluate.harness.task_data import read_record_file, read_records
from moe_app.evaluate.judging.judge import Judge
from moe_app.evaluate.judging.mt_bench import (
    RATING,
    MtQuestion,
    first_turn_judged,
    mt_bench_scores,
    rating,
    read_questions,
    second_turn_judged,
)
from moe_app.evaluate.judging.verdicts import (
    BETTER,
    REFUSAL,
    classified,
    compared,
    comparison,
    is_unsafe,
    refusal_scores,
    text_of,
    win_rate,
)
from moe_app.infer.conversations import Conversations

logger = logging.getLogger("evaluate")

_USER = "user"
_MT_TOKENS = 1024
_ANSWER_TOKENS = 2048
_ALPACA = ("tatsu-lab/alpaca_eval", "alpaca_eval", "eval")
_XSTEST = ("walledai/XSTest", None, "test")
"""Id on the Hub, configuration and split."""

Chat = Sequence[tuple[str, str]]
"""Turns: role and text."""


def check_judged(model: HarnessModel, names: Sequence[str], args: argparse.Namespace) -> None:
    """Refuse, before the model answers anything, what `JudgedTasks` would refuse.

    Raises:
        UserError: data are not there, or the model is too short for the answers.
    """
    given = simple_parse_args_string(args.gen_kwargs or "")
    for name in names:
        _READERS[name](_root(name, args))
        tokens = _MT_TOKENS if name == "mt_bench" else _ANSWER_TOKENS
        check_room(model, name, {"max_gen_toks": tokens, **given})


class JudgedTasks:
    """Runs the tasks that a judge scores.

    Args:
        model: answers.
        args: of the command line.
        conversations: writes them as the model was taught.
        judge: scores the answers.
    """

    def __init__(
        self,
        model: HarnessModel,
        args: argparse.Namespace,
        conversations: Conversations,
        judge: Judge,
    ) -> None:
        self._model = model
        self._args = args
        self._conversations = conversations
        self._judge = judge
        self._given = simple_parse_args_string(args.gen_kwargs or "")

    def run(self, name: str) -> dict[str, Any]:
        """Score a task, write its samples, and return its results.

        Raises:
            UserError: its data are not there, or the judge fails.
        """
        root = _root(name, self._args)
        tasks = {"mt_bench": self._mt_bench, "alpaca_eval": self._alpaca, "xstest": self._xstest}
        found, samples = tasks[name](root)
        path = Path(self._args.output) / f"samples_{name}.jsonl"
        with atomic_write(path, durable=True) as file:
            for number, sample in enumerate(samples):
                file.write(json.dumps({"doc_id": number, **sample}).encode() + b"\n")
        return {"alias": name, **found, "sample_len": len(samples)}

    def _mt_bench(self, root: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
        questions = _read_mt_bench(root)[: self._args.limit]
        answers = self._have_conversations(questions)
        judged = [first_turn_judged, second_turn_judged]
        asked = [
            judge(question, pair)
            for question, pair in zip(questions, answers, strict=True)
            for judge in judged
        ]
        judgements = self._judge.ask_all(asked, RATING)
        values = [rating(each.verdict) for each in judgements]
        ratings = list(zip(values[::2], values[1::2], strict=True))
        samples = [
            {
                "question_id": question.question_id,
                "category": question.category,
                "turns": question.turns,
                "resps": [[answer] for answer in pair],
                "ratings": ratings[number],
                "judgements": [each.text for each in judgements[2 * number : 2 * number + 2]],
            }
            for number, (question, pair) in enumerate(zip(questions, answers, strict=True))
        ]
        return mt_bench_scores([each.category for each in questions], ratings), samples

    def _have_conversations(self, questions: Sequence[MtQuestion]) -> list[tuple[str, str]]:
        """Return the model's answers to both turns."""
        chats: list[list[tuple[str, str]]] = [[] for _ in questions]
        for turn in range(2):
            for chat, question in zip(chats, questions, strict=True):
                chat.append((_USER, question.turns[turn]))
            said = self._answer(
                chats, _MT_TOKENS, temperatures=[each.temperature for each in questions]
            )
            for chat, text in zip(chats, said, strict=True):
                chat.append((ASSISTANT, text))
        return [(chat[1][1], chat[3][1]) for chat in chats]

    def _alpaca(self, root: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
        pairs = _read_alpaca(root)[: self._args.limit]
        answers = self._answer([[(_USER, asked)] for asked, _ in pairs], _ANSWER_TOKENS)
        judgements = self._judge.ask_all(
            [
                compared(asked, answer, reference)
                for (asked, reference), answer in zip(pairs, answers, strict=True)
            ],
            BETTER,
        )
        ends = [
            comparison(asked, each.verdict)
            for (asked, _), each in zip(pairs, judgements, strict=True)
        ]
        samples = [
            {
                "instruction": asked,
                "reference": reference,
                "resps": [[answer]],
                "comparison": end,
                "judgement": judgement.text,
            }
            for (asked, reference), answer, end, judgement in zip(
                pairs, answers, ends, judgements, strict=True
            )
        ]
        return win_rate(ends), samples

    def _xstest(self, root: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
        items = _read_xstest(root)[: self._args.limit]
        prompts, unsafe = [prompt for prompt, _ in items], [bad for _, bad in items]
        answers = self._answer([[(_USER, prompt)] for prompt in prompts], _ANSWER_TOKENS)
        judgements = self._judge.ask_all(
            [classified(*pair) for pair in zip(prompts, answers, strict=True)], REFUSAL
        )
        verdicts = [each.verdict for each in judgements]
        samples = [
            {
                "prompt": prompt,
                "unsafe": bad,
                "resps": [[answer]],
                "verdict": judgement.verdict,
                "judgement": judgement.text,
            }
            for prompt, bad, answer, judgement in zip(
                prompts, unsafe, answers, judgements, strict=True
            )
        ]
        return refusal_scores(unsafe, verdicts), samples

    def _answer(
        self, chats: Sequence[Chat], tokens: int, *, temperatures: Iterable[float] | None = None
    ) -> list[str]:
        """Return the model's answer in each conversation; greedy without temperatures."""
        prompts = []
        for chat, temperature in zip(chats, temperatures or [0.0] * len(chats), strict=True):
            settings: Mapping[str, Any] = {
                "until": [],
                "max_gen_toks": tokens,
                "do_sample": temperature > 0,
                "temperature": temperature,
                **self._given,
            }
            ids = self._conversations.encode_turns(tuple(Turn(*each) for each in chat))
            cut = self._model.cut_prompt(ids, settings)
            if len(cut[0]) < len(ids):
                logger.warning(
                    "a conversation of %d tokens is cut from the left to %d", len(ids), len(cut[0])
                )
            prompts.append(cut)
        return [text.strip() for text in self._model.continue_prompts(prompts)]


def _root(name: str, args: argparse.Namespace) -> Path:
    """Return the directory of data."""
    if args.task_data is None:
        raise ConfigError(
            f"{name} is read from files alone; name the directory that has it with --task-data"
            " (docs/evaluation.md says how it is laid out)"
        )
    return Path(args.task_data)


def _read_mt_bench(root: Path) -> list[MtQuestion]:
    """Return the questions of MT-Bench."""
    folder = root / "mt_bench"
    references = folder / "reference_answer" / "gpt-4.jsonl"
    return read_questions(
        read_record_file(root, folder / "question.jsonl"),
        read_record_file(root, references) if references.exists() else (),
    )


def _read_alpaca(root: Path) -> list[tuple[str, str]]:
    """Return the instructions of AlpacaEval, with the answers of the reference."""
    return [
        (
            text_of(record, "instruction", f"AlpacaEval, record {number}"),
            text_of(record, "output", f"AlpacaEval, record {number}"),
        )
        for number, record in enumerate(read_records(root, *_ALPACA), start=1)
    ]


def _read_xstest(root: Path) -> list[tuple[str, bool]]:
    """Return the prompts of XSTest, and whether each deserves a refusal."""
    return [
        (
            text_of(record, "prompt", f"XSTest, record {number}"),
            is_unsafe(text_of(record, "type", f"XSTest, record {number}")),
        )
        for number, record in enumerate(read_records(root, *_XSTEST), start=1)
    ]


_READERS: Mapping[str, Callable[[Path], Any]] = {
    "mt_bench": _read_mt_bench,
    "alpaca_eval": _read_alpaca,
    "xstest": _read_xstest,
}
"""What reads the data of a task."""
