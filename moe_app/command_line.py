"""What the command lines of tools share that run without torch."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.trainer.errors import UserError, printable


def program(tool: str, *, command: str | None = None) -> str:
    """Return the name that a usage line shows: that of `tools/TOOL.py` or of the console command.

    Args:
        tool: file of tools/, without its suffix.
        command: what `megatron-moe` calls it; None if the same.
    """
    if Path(sys.argv[0]).name == "megatron-moe":
        return f"megatron-moe {command or tool}"
    return f"{tool}.py"


def tell_errors(action: Callable[[], object]) -> int:
    """Do `action`; an error that the user can mend becomes one line.

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
    """A type of argparse's: a pause from a tenth of a second to `most` seconds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not from 0.1 to {most} seconds")
        return value

    return parse
