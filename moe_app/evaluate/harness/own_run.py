"""Scores what the harness does not: programs, which are run in a sandbox."""

import argparse
from typing import Any

from moe_app.evaluate.coding.problems import CODE_TASKS
from moe_app.evaluate.harness.code_run import evaluate_code
from moe_app.evaluate.harness.model import HarnessModel
from moe_app.evaluate.suites import Suite
from moe_app.infer.conversations import Conversations


def evaluate_own(
    model: HarnessModel,
    suite: Suite,
    args: argparse.Namespace,
    conversations: Conversations | None,
) -> dict[str, dict[str, Any]]:
    """Score the tasks of a suite that are scored here, write samples, and return the results.

    Raises:
        UserError: data are not there, or programs cannot be run here.
    """
    results: dict[str, dict[str, Any]] = {}
    code = [name for name in suite.own if name in CODE_TASKS]
    if code:
        number = suite.code_samples if args.code_samples is None else args.code_samples
        results |= evaluate_code(model, code, args, conversations, num_samples=number)
    return results
