"""Scores what the harness does not: programs, which run in a sandbox, and answers, by a judge."""

import argparse
from pathlib import Path
from typing import Any

from moe_app.evaluate import own_flags
from moe_app.evaluate.coding.problems import CODE_TASKS
from moe_app.evaluate.harness.code_run import check_code, evaluate_code
from moe_app.evaluate.harness.judge_run import JudgedTasks, check_judged
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.judging.judge import Judge
from moe_app.evaluate.suites import JUDGED_TASKS, Suite, asks_in_conversations
from moe_app.infer.conversations import Conversations


def check_own(model: HarnessModel, suite: Suite, args: argparse.Namespace) -> None:
    """Refuse, before the model answers anything, what `evaluate_own` would refuse.

    Whether the judge answers is not asked: it may start later.

    Raises:
        UserError: data are not there, programs cannot be run here, or the model is too short.
    """
    code = [name for name in suite.own if name in CODE_TASKS]
    if code:
        is_chat = asks_in_conversations(args, suite)
        check_code(model, code, args, is_chat=is_chat, num_samples=_num_samples(suite, args))
    check_judged(model, [name for name in suite.own if name in JUDGED_TASKS], args)


def _num_samples(suite: Suite, args: argparse.Namespace) -> int:
    """Return how many completions a problem has."""
    return suite.code_samples if args.code_samples is None else args.code_samples


def evaluate_own(
    model: HarnessModel,
    suite: Suite,
    args: argparse.Namespace,
    conversations: Conversations | None,
) -> dict[str, dict[str, Any]]:
    """Score the tasks of a suite that are scored here, write samples, and return the results.

    Raises:
        UserError: data are not there, programs cannot be run here, or a judge fails.
    """
    results: dict[str, dict[str, Any]] = {}
    code = [name for name in suite.own if name in CODE_TASKS]
    if code:
        is_chat = asks_in_conversations(args, suite)
        results |= evaluate_code(
            model,
            code,
            args,
            conversations if is_chat else None,
            num_samples=_num_samples(suite, args),
        )
    judged = [name for name in suite.own if name in JUDGED_TASKS]
    if judged and conversations is not None:
        settings = own_flags.judge_settings(args, ", ".join(judged))
        judge = Judge(Path(args.output), settings)
        tasks = JudgedTasks(model, args, conversations, judge)
        results |= {name: tasks.run(name) for name in judged}
    return results
