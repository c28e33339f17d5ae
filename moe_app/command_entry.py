"""Describes a command of `megatron-moe`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Argv = Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Command:
    """Describes one command in the list of `--help`."""

    name: str
    """As in `megatron-moe NAME`."""
    summary: str
    run: Callable[[Argv], int]

    @property
    def tool(self) -> str:
        """Return its name as in `tools/TOOL.py`: that of the function."""
        return self.run.__name__
