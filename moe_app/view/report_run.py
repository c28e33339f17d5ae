"""Write one HTML page on one or several runs: curves, expert load, events, settings.

    python tools/report_run.py runs/olmoe
    python tools/report_run.py runs/a runs/b --output comparison.html

The page needs no network and no other file: open it in a browser, mail it, print it. It is bounded
in size however long the runs are. docs/watching.md explains what is shown.
"""

import argparse
import datetime
import time
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.errors import ConfigError, printable
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.run_dir import check_run, run_names
from moe_app.command_line import program, report_errors
from moe_app.view.html_page import make_page
from moe_app.view.page_data import LAYER_KEYS


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page that `argv` asks for; returns the exit status."""
    args = parse_args(argv)
    directories, output = [Path(run) for run in args.runs], Path(args.output)
    return report_errors(lambda: write_report(directories, output, title=args.title))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("report_run", command="report-run"),
        description="Write one HTML page on one or several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's --save directory")
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="the page (%(default)s)"
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page; the runs' names without it")
    return parser.parse_args(argv)


def write_report(directories: Sequence[Path], output: Path, *, title: str | None) -> None:
    """Write the page and say where.

    Raises:
        ConfigError: a directory holds no run, or the page cannot be written.
    """
    for directory in directories:
        check_run(directory, given_as="RUN")
    names = run_names(directories)
    histories = [RunHistory(directory, layer_keys=tuple(LAYER_KEYS)) for directory in directories]
    page = make_page(
        list(zip(names, histories, strict=True)),
        [history.state(time.time()) for history in histories],
        title=title or ", ".join(names),
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    try:
        write_text(output, page, errors="replace")
    except OSError as error:
        raise ConfigError(
            f"cannot write --output {output}: {error.strerror}; give a file in a directory that is"
            " there and may be written to"
        ) from error
    print(printable(f"{output}: {output.stat().st_size / 1e6:.1f} MB on {', '.join(names)}"))
