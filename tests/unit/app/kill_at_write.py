"""Ends a command at one of its writes, as a kill would, in a process of its own."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Owner = tuple[Any, str]
"""An object, and the name of a function in it that writes."""


def kill_at(write: int, owners: Sequence[Owner]) -> None:
    """Make this process end without notice at one of its writes, before or after it."""
    count = 0

    def killing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            is_last = count == write
            if is_last and write % 2:
                os._exit(9)
            try:
                return call(*arguments, **settings)
            finally:
                if is_last:
                    os._exit(9)

        return wrapped

    for owner, name in owners:
        setattr(owner, name, killing(getattr(owner, name)))


def run(
    main: Callable[[list[str]], int],
    command: list[str],
    *,
    kill: int | None = None,
    owners: Sequence[Owner] = (),
) -> int:
    """Run a command in a child, which ends at a write if told to; return its exit status."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        if kill is not None:
            kill_at(kill, owners)
        os._exit(main(command))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
