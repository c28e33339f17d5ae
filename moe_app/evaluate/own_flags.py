"""Defines flags: which tasks, and those of what is scored here and not by the harness."""

import argparse
import os
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import environment_secret
from moe_app.chat.prompting import TEMPLATE_NAMES
from moe_app.evaluate.judging.endpoint import JudgeSettings
from moe_app.evaluate.suites import SUITES
from moe_app.infer import open_model

_MOST_KEY_BYTES = 1 << 14


def natural(text: str) -> int:
    """Parse an integer of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 0")
    return int(text)


def _task_names(text: str) -> list[str]:
    """Read names that are separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; separate names by one comma")
    return names


def add_task_flags(group: "argparse._ArgumentGroup") -> None:
    """Add the flags that name tasks."""
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tasks",
        type=_task_names,
        metavar="A,B",
        help="names of tasks, groups or tags, of the harness or in --include-path",
    )
    what.add_argument("--suite", choices=sorted(SUITES), help="tasks of a leaderboard or paper")
    group.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="directory of task files (YAML); they are code: name only what you trust",
    )


def add_conversation_flag(group: "argparse._ArgumentGroup") -> None:
    """Add the flag for how conversations are written."""
    group.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        help="ask every task in a conversation, and write conversations with this template; without"
        " it a suite decides, and the template is that of fine-tuning, or the tokenizer's",
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


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the model that judges answers."""
    group = parser.add_argument_group(
        "judge",
        "The tasks mt_bench, alpaca_eval and xstest ask a model behind an endpoint with OpenAI's"
        " interface (POST URL/chat/completions) to judge each answer.",
    )
    group.add_argument("--judge-url", metavar="URL", help="such as http://localhost:8000/v1")
    group.add_argument("--judge-model", metavar="NAME", help="name of the judge there")
    key = group.add_mutually_exclusive_group()
    key.add_argument("--judge-key-file", metavar="FILE", help="file that holds the key, alone")
    key.add_argument(
        "--judge-key-env", metavar="NAME", help="environment variable that holds the key"
    )
    group.add_argument(
        "--judge-timeout",
        type=open_model.positive,
        default=120,
        metavar="SECONDS",
        help="of one try (%(default)s)",
    )
    group.add_argument(
        "--judge-retries",
        type=natural,
        default=5,
        metavar="N",
        help="further tries after time-outs, lost connections and status 429 or 5xx, with growing"
        " pauses (%(default)s)",
    )
    group.add_argument(
        "--judge-concurrency",
        type=open_model.positive,
        default=8,
        metavar="N",
        help="questions to the judge side by side (%(default)s)",
    )


def judge_settings(args: argparse.Namespace, names: str) -> JudgeSettings:
    """Return where the judge is.

    Args:
        args: of the command line.
        names: of the tasks, for the message.

    Raises:
        ConfigError: it is not said, or its key is not there.
    """
    if args.judge_url is None or args.judge_model is None:
        raise ConfigError(
            f"{names} need a judge; name one with --judge-url and --judge-model, such as a server"
            " of vLLM at http://localhost:8000/v1"
        )
    return JudgeSettings(
        url=args.judge_url,
        model=args.judge_model,
        key=_read_key(args),
        seconds=args.judge_timeout,
        retries=args.judge_retries,
        concurrency=args.judge_concurrency,
    )


def _read_key(args: argparse.Namespace) -> str | None:
    """Return the key of the judge; None for none."""
    if args.judge_key_file is not None:
        try:
            with Path(args.judge_key_file).open("rb") as file:
                key = file.read(_MOST_KEY_BYTES).decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--judge-key-file {args.judge_key_file} cannot be read as a key:"
                f" {type(error).__name__}; name the file that holds the key alone"
            ) from None
        where = f"--judge-key-file {args.judge_key_file}"
    elif args.judge_key_env is not None:
        key = (environment_secret(args.judge_key_env) or "").strip()
        where = f"--judge-key-env {args.judge_key_env}"
    else:
        return None
    if not key:
        raise ConfigError(f"{where} holds no key; put it there, or leave the flag out")
    return key
