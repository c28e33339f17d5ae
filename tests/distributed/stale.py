"""One rank's outdated view of a directory, as a network file system may show it."""

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock


@contextlib.contextmanager
def hidden(
    directory: Path, names: Collection[str], *, view: Literal["listing", "all"]
) -> Iterator[None]:
    """Let this process not see some entries of `directory`, nor what lies in them.

    Args:
        directory: the one whose entries are hidden.
        names: the entries.
        view: in what they are missing: in listings alone, which are cached longest, or also when
            they are asked for by name.
    """
    gone = [str(directory / name) for name in names]

    def is_gone(path: Any) -> bool:
        text = "" if isinstance(path, int) else os.path.abspath(os.fspath(path))
        return any(text == each or text.startswith(f"{each}/") for each in gone)

    def missing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if is_gone(path):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return original(path, *args, **kwargs)

        return call

    def shortened(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def listdir(path: Any = ".") -> list[str]:
            return [name for name in original(path) if not is_gone(Path(path, name))]

        return listdir

    functions = [(os, "stat"), (os, "lstat"), (os, "open"), (os, "listdir"), (os, "scandir")]
    functions += [(builtins, "open"), (io, "open")]
    with contextlib.ExitStack() as stack:
        for owner, name in functions if view == "all" else ():
            stack.enter_context(mock.patch.object(owner, name, missing(getattr(owner, name))))
        stack.enter_context(mock.patch.object(os, "listdir", shortened(os.listdir)))
        yield
