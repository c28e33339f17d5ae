"""Provides what command lines share; needs no torch."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.trainer.errors import UserError, printable


def program(tool: str, *, command: str | None = None) -> str:
    """Return the name for usage lines: that of `tools/TOOL.py` or of the console command.

    Args:
        tool: file name in tools/, without its suffix.
        command: name of the `megatron-moe` command; None if it is the same.
    """
    if Path(sys.argv[0]).name == "megatron-moe":
        return f"megatron-moe {command or tool}"
    return f"{tool}.py"


def report_errors(action: Callable[[], object]) -> int:
    """Run `action` and print an error that the user can fix as one line.

    Returns:
        The exit status: 0, or 2 after an error.
    """
    try:
        action()
    except (UserError, OSError) as error:
        print(printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    return 0


def seconds_up_to(most: int) -> Callable[[str], float]:
    """Return an argparse type for an interval from 0.1 to `most` seconds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} must be from 0.1 to {most} seconds")
        return value

    return parse
