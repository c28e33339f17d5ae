"""Lists the tasks, examples and metrics of leaderboards and papers."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_app.evaluate.coding.problems import CODE_TASKS


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Holds tasks to evaluate together."""

    tasks: tuple[str, ...]
    """Names of the harness."""
    num_fewshot: Mapping[str, int] = field(default_factory=dict)
    """Examples in a prompt by task; others use the task's own number."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Items of a task, or of each task of a group; others have all."""
    own: tuple[str, ...] = ()
    """Names of what is scored here, and not by the harness: see `OWN_TASKS`."""
    code_samples: int = 1
    """Completions of each problem of programming."""
    is_chat: bool = False
    """Whether tasks are asked in conversations."""


OLMES = "olmes"
"""Names the suite that is read from published requests, not from tasks of the harness."""

JUDGED_TASKS = ("mt_bench", "alpaca_eval", "xstest")
"""Tasks that a judge scores."""
OWN_TASKS = (*CODE_TASKS, *JUDGED_TASKS)
"""What --tasks takes beside the names of the harness, and before them."""

SUITES: dict[str, Suite] = {
    OLMES: Suite(tasks=()),
    # Open LLM Leaderboard, version 1, as JetMoE's Table 3 reports it.
    "openllm": Suite(
        tasks=("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k"),
        num_fewshot={
            "arc_challenge": 25,
            "hellaswag": 10,
            "mmlu": 5,
            "truthfulqa_mc2": 0,
            "winogrande": 5,
            "gsm8k": 5,
        },
    ),
    # OLMoE, Table 11, during pretraining. Validation splits; where the harness's own task has
    # another one or other prompts, ours is in tasks/.
    "olmoe_during": Suite(
        tasks=(
            "olmoe_during_arc_challenge",
            "olmoe_during_arc_easy",
            "boolq",
            "copa",
            "olmoe_during_csqa",
            "hellaswag",
            "olmoe_during_openbookqa",
            "piqa",
            "olmoe_during_sciq",
            "olmoe_during_socialiqa",
            "winogrande",
            "olmoe_during_mmlu",
            "olmoe_during_mmlu_var",
        ),
        num_fewshot={"olmoe_during_mmlu": 5, "olmoe_during_mmlu_var": 5},
    ),
    # OLMoE, Table 5.
    "adapted": Suite(
        tasks=("mmlu", "gsm8k_cot", "bbh_cot_fewshot", "ifeval"),
        num_fewshot={"mmlu": 0},
        limits={"gsm8k_cot": 200, "bbh_cot_fewshot": 40},
        own=("humaneval", "alpaca_eval", "xstest"),
        code_samples=20,
        is_chat=True,
    ),
    "code": Suite(tasks=(), own=("humaneval", "mbpp")),
    "mtbench": Suite(tasks=(), own=("mt_bench",), is_chat=True),
}
"""By the name that --suite takes."""


def asks_in_conversations(args: argparse.Namespace, suite: Suite) -> bool:
    """Return whether tasks are asked in conversations, beside those that a judge scores."""
    return suite.is_chat or args.template is not None


def named_suite(names: Sequence[str]) -> Suite:
    """Return tasks by their names, those of the harness apart from those that are scored here.

    A task that is named twice is one.
    """
    tasks = dict.fromkeys(names)
    return Suite(
        tasks=tuple(name for name in tasks if name not in OWN_TASKS),
        own=tuple(name for name in tasks if name in OWN_TASKS),
    )
