"""Watch one or several runs in a terminal: losses, speed, expert health, events.

    python tools/watch.py runs/olmoe
    python tools/watch.py runs/a runs/b --interval 10

Reads the run directories only, so it may run anywhere that sees them, and as often as you like.
It ends with the last run that is not to be started again, or on Ctrl-C. docs/watching.md explains
what is shown.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from megatron.trainer.records.history import RunHistory
from megatron.trainer.records.run_dir import check_run, run_names
from moe_app.command_line import program, report_errors, seconds_up_to
from moe_app.view.screen import RunSnapshot, Screen, draw_frame, take_snapshot

_X = {"tokens": "consumed_tokens", "iterations": "iteration"}


def main(argv: Sequence[str] | None = None) -> int:
    """Watch what `argv` names; returns the exit status."""
    args = parse_args(argv)
    return report_errors(lambda: watch(args, Console(highlight=False, soft_wrap=True)))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program("watch"), description="Watch one or several runs in a terminal."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's --save directory")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--interval",
        type=seconds_up_to(86400),
        default=5.0,
        metavar="SECONDS",
        help="between two looks at the files (%(default)g)",
    )
    parser.add_argument(
        "--x", choices=_X, default="tokens", help="what the loss is drawn over (%(default)s)"
    )
    return parser.parse_args(argv)


def watch(args: argparse.Namespace, console: Console) -> None:
    """Show frames until every run has ended.

    Raises:
        ConfigError: a directory holds no run.
    """
    directories = [Path(run) for run in args.runs]
    for directory in directories:
        check_run(directory, given_as="RUN")
    names = run_names(directories)
    histories = [RunHistory(directory) for directory in directories]

    def look() -> list[RunSnapshot]:
        for history in histories:
            history.refresh()
        pairs = zip(names, histories, strict=True)
        return [take_snapshot(name, history, time.time()) for name, history in pairs]

    runs = look()
    try:
        if console.is_terminal and not args.once:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while not all(run.state.is_over for run in runs):
                    live.update(_frame(runs, console, args.x), refresh=True)
                    time.sleep(args.interval)
                    runs = look()
        elif not args.once:
            while not all(run.state.is_over for run in runs):
                console.print(_frame(runs, console, args.x), "")
                time.sleep(args.interval)
                runs = look()
    except KeyboardInterrupt:
        if not console.is_terminal:
            return
    console.print(_frame(runs, console, args.x))


def _frame(runs: Sequence[RunSnapshot], console: Console, x: str) -> Group:
    screen = Screen(
        width=console.width,
        # The last line is left to the prompt.
        height=console.height - 1,
        in_colour=console.color_system is not None and not console.no_color,
        ascii_only=console.options.ascii_only,
        x=_X[x],
    )
    return Group(*draw_frame(runs, screen))
