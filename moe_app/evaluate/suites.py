"""Lists the tasks, examples and metrics of leaderboards and papers."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Holds tasks to evaluate together."""

    tasks: tuple[str, ...]
    """Names of the harness."""
    num_fewshot: Mapping[str, int] = field(default_factory=dict)
    """Examples in a prompt by task; others use the task's own number."""


OLMES = "olmes"
"""Names the suite that is read from published requests, not from tasks of the harness."""

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
}
"""By the name that --suite takes."""
