"""Lets a model write programs, and scores them."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.utils import simple_parse_args_string

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import atomic_write
from moe_app.evaluate.coding.problems import CODE_TASKS, Problem
from moe_app.evaluate.coding.scoring import Runner, sample_record, score_problems
from moe_app.evaluate.execution.prison import ProgramLimits
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.harness.preflight import check_room
from moe_app.evaluate.harness.task_data import read_records
from moe_app.infer.conversations import Conversations

logger = logging.getLogger("evaluate")

_MOST_NEW_TOKENS = 512
_DRAWS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
"""How several completions of a problem are drawn; a single one is greedy."""


def open_runner(args: argparse.Namespace) -> Runner:
    """Return what runs programs; refuses before the model has written any.

    Raises:
        ConfigError: this machine does not allow it.
    """
    return Runner(
        Path(args.output),
        "bubblewrap" if args.unsafe_execution is None else args.unsafe_execution,
        limits=ProgramLimits(seconds=args.execution_timeout),
        workers=args.execution_workers,
    )


def check_code(
    model: HarnessModel,
    names: Sequence[str],
    args: argparse.Namespace,
    *,
    is_chat: bool,
    num_samples: int,
) -> None:
    """Refuse, before the model answers anything, what `evaluate_code` would refuse.

    Raises:
        UserError: the data are not there, or programs cannot be run here.
    """
    open_runner(args)
    for name in names:
        _read(name, args, is_chat=is_chat)
        check_room(model, name, _settings(args, num_samples))


def evaluate_code(
    model: HarnessModel,
    names: Sequence[str],
    args: argparse.Namespace,
    conversations: Conversations | None,
    *,
    num_samples: int,
) -> dict[str, dict[str, Any]]:
    """Score tasks of programming, write samples, and return the results.

    Raises:
        UserError: the data are not there, or programs cannot be run here.
    """
    runner = open_runner(args)
    results = {}
    for name in names:
        problems = _read(name, args, is_chat=conversations is not None)
        completions = _write(model, problems, args, conversations, num_samples)
        programs = [
            problem.program(text)
            for problem, texts in zip(problems, completions, strict=True)
            for text in texts
        ]
        logger.info("%s: running %d programs", name, len(programs))
        outcomes = runner.run_all(programs)
        grouped = [
            outcomes[begin : begin + num_samples] for begin in range(0, len(outcomes), num_samples)
        ]
        with atomic_write(Path(args.output) / f"samples_{name}.jsonl", durable=True) as file:
            for number, each in enumerate(zip(problems, completions, grouped, strict=True)):
                file.write(json.dumps(sample_record(number, *each)).encode() + b"\n")
        results[name] = {
            "alias": name,
            **score_problems([[each.passed for each in some] for some in grouped]),
            "sample_len": len(problems),
            "samples": num_samples,
        }
    return results


def _read(name: str, args: argparse.Namespace, *, is_chat: bool) -> list[Problem]:
    """Read the problems of a task.

    Raises:
        UserError: they are not there.
    """
    task = CODE_TASKS[name]
    if args.task_data is None:
        raise ConfigError(
            f"{name} is read from files alone; name the directory that has {task.dataset} with"
            " --task-data (docs/evaluation.md says how it is laid out)"
        )
    root = Path(args.task_data)
    records = read_records(root, task.dataset, task.config, task.split)[: args.limit]
    examples: Sequence[Mapping[str, Any]] = ()
    if task.examples_split is not None:
        examples = read_records(root, task.dataset, task.config, task.examples_split)
    return task.read(records, examples, is_chat)


def _settings(args: argparse.Namespace, num_samples: int) -> dict[str, Any]:
    """Return how completions are drawn."""
    given: Mapping[str, Any] = simple_parse_args_string(args.gen_kwargs or "")
    return {"max_gen_toks": _MOST_NEW_TOKENS, **(_DRAWS if num_samples > 1 else {}), **given}


def _write(
    model: HarnessModel,
    problems: Sequence[Problem],
    args: argparse.Namespace,
    conversations: Conversations | None,
    num_samples: int,
) -> list[list[str]]:
    """Return the completions of each problem."""
    common = _settings(args, num_samples)
    prompts = []
    for problem in problems:
        settings = {"until": list(problem.stops), **common}
        if conversations is None:
            ids = model.tok_encode(problem.prompt)
        else:
            begins = model.tok_encode(problem.answer_begins, add_special_tokens=False)
            ids = [*conversations.encode_user(problem.prompt), *begins]
        prompts += [model.cut_prompt(ids, settings)] * num_samples
    texts = model.continue_prompts(prompts)
    return [texts[begin : begin + num_samples] for begin in range(0, len(texts), num_samples)]
