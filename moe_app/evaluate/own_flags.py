"""Defines the flags of what is scored here and not by the harness."""

import argparse
import os

from moe_app.chat.prompting import TEMPLATE_NAMES
from moe_app.infer import open_model


def add_conversation_flag(group: "argparse._ArgumentGroup") -> None:
    """Add the flag for how conversations are written."""
    group.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        help="ask humaneval and mbpp in a conversation, and write conversations with this template;"
        " without it a suite decides, and the template is that of fine-tuning, or the tokenizer's",
    )


def add_execution_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for running what a model wrote."""
    group = parser.add_argument_group(
        "generated programs", "The tasks humaneval and mbpp run what the model wrote."
    )
    group.add_argument(
        "--code-samples",
        type=open_model.positive,
        metavar="N",
        help="completions of each problem; one is greedy, several are drawn at temperature 0.8 and"
        " give pass@k (1, and 20 in the suite adapted)",
    )
    group.add_argument(
        "--execution-workers",
        type=open_model.positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="programs that run side by side (the number of processors)",
    )
    group.add_argument(
        "--execution-timeout",
        type=open_model.positive,
        default=60,
        metavar="SECONDS",
        help="of a program by the clock; it has 10 s of processor time (%(default)s)",
    )
    group.add_argument(
        "--unsafe-execution",
        choices=("limits",),
        help="run programs WITHOUT a sandbox, within limits of time, memory, processes and output;"
        " they can read and write what you can, and use the network",
    )
