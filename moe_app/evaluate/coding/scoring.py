"""Runs completions of problems, keeps how they ended, and computes pass@k."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_app.evaluate.answers import AnswerFile, request_key
from moe_app.evaluate.coding.problems import Problem
from moe_app.evaluate.execution.prison import ProgramLimits
from moe_app.evaluate.execution.sandbox import Boundary, Outcome, Sandbox

OUTCOMES_NAME = "outcomes.jsonl"
"""File of --output that keeps how programs ended."""

_SHOWN_KS = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that one of `k` completions passes, without bias.

    Chen et al., equation 1: one minus the share of the choices of `k` of the samples in which none
    passed.

    Args:
        samples: completions that were tried, at least `k`.
        passed: those that passed.
        k: completions to choose.
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def shown_ks(samples: int) -> list[int]:
    """Return the k of which a number of samples allows an estimate."""
    return [k for k in _SHOWN_KS if k <= samples]


def score_problems(passed: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return pass@k over problems, and its standard error.

    Args:
        passed: of each problem, whether each completion passed; as many for each.
    """
    found = {}
    for k in shown_ks(len(passed[0])):
        each = [pass_at_k(len(some), sum(some), k) for some in passed]
        mean = math.fsum(each) / len(each)
        found[f"pass@{k},none"] = mean
        if len(each) > 1:
            variance = math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1)
            found[f"pass@{k}_stderr,none"] = math.sqrt(variance / len(each))
    return found


class Runner:
    """Runs programs that were not run before.

    Args:
        output: directory that keeps how programs ended.
        boundary: what keeps programs in.
        limits: of each program.
        workers: programs side by side.
    """

    def __init__(
        self, output: Path, boundary: Boundary, *, limits: ProgramLimits, workers: int
    ) -> None:
        self._output = output
        self._boundary: Boundary = boundary
        self._limits = limits
        self._sandbox = Sandbox(boundary, limits=limits, workers=workers)

    def run_all(self, programs: Sequence[str]) -> list[Outcome]:
        """Return how each program ends; the same program runs once."""
        how = [self._boundary, dataclasses.asdict(self._limits)]
        keys = [request_key("program", [program, *how]) for program in programs]
        with AnswerFile(self._output / OUTCOMES_NAME, {"kind": "outcomes of programs"}) as known:
            missing = {
                key: program
                for key, program in zip(keys, programs, strict=True)
                if known.get(key) is None
            }
            ended = self._sandbox.run_all(missing.values())
            for key, outcome in zip(missing, ended, strict=True):
                known.add({key: [outcome.ending, outcome.error, outcome.output]})
            return [_outcome(known.get(key)) for key in keys]


def _outcome(kept: Any) -> Outcome:
    ending, error, output = kept
    return Outcome(ending=ending, error=error, output=output)


def sample_record(
    number: int, problem: Problem, completions: Sequence[str], outcomes: Sequence[Outcome]
) -> Mapping[str, Any]:
    """Return what is kept of a problem."""
    return {
        "doc_id": number,
        "task_id": problem.task_id,
        "prompt": problem.prompt,
        "resps": [list(completions)],
        "passed": [outcome.passed for outcome in outcomes],
        "endings": [outcome.ending for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }
