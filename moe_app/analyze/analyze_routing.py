r"""Analyse what a model's routers learned: collect their choices, then measure and draw them.

    torchrun --nproc-per-node 2 tools/analyze_routing.py collect --load runs/a \
        --data code=code.jsonl docs=docs.jsonl --output routing/a
    python tools/analyze_routing.py report --input routing/a --output routing/report

docs/analysis.md defines every measure.
"""

import argparse
import functools
from collections.abc import Sequence

from megatron.trainer.runtime.launch import run_main
from moe_app.analyze import collect, routing_report
from moe_app.analyze.steps import STEPS, run_step
from moe_app.command_line import program
from moe_app.infer import open_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step that `argv` names; return the exit status."""
    args = open_model.parse(make_parser(), argv)
    return run_main(lambda: args.run(args))


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("analyze_routing", command="analyze"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    step = steps.add_parser("collect", help="run a model over texts and keep its routing")
    collect.add_flags(step)
    step.set_defaults(run=collect.run)
    for each in STEPS:
        step = steps.add_parser(each.name, help=each.summary, description=each.meaning)
        _add_places(step)
        each.add_flags(step)
        step.set_defaults(run=functools.partial(run_step, step=each))
    step = steps.add_parser("report", help="all of them on one page, with figures and tables")
    _add_places(step)
    routing_report.add_flags(step)
    step.set_defaults(run=routing_report.run_report)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="DIR",
        help="what `collect` wrote; several checkpoints' for saturation",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="of tables and figures; replaced there"
    )
