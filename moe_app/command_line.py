"""Provides what command lines share; needs no torch."""

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from megatron.trainer.errors import UserError, printable

P = ParamSpec("P")
T = TypeVar("T")


def program(tool: str, *, command: str | None = None) -> str:
    """Return the name for usage lines: that of `tools/TOOL.py` or of the console command.

    Args:
        tool: file name in tools/, without its suffix.
        command: name of the `megatron-moe` command; None if it is the same.
    """
    if Path(sys.argv[0]).name == "megatron-moe":
        return f"megatron-moe {command or tool}"
    return f"{tool}.py"


def argument_text(text: str) -> str:
    """Return a text of the command line, for argparse.

    Python reads arguments in the encoding of the locale, and keeps bytes that it cannot read. Under
    an ASCII locale a text in UTF-8 comes as such bytes; those that are no UTF-8 stay as they are.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def prints_any_text(command: Callable[P, T]) -> Callable[P, T]:
    """Let a command print what its output cannot encode as escapes, and not end in a traceback.

    Texts and paths may hold any character; the locale, or PYTHONIOENCODING, may allow ASCII only.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return command(*args, **kwargs)

    return run


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
