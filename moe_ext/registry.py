"""Looks up and registers building blocks in tables by name."""

import difflib
from typing import TypeVar

Block = TypeVar("Block")

_NEAR = 0.75
"""Likeness from which on a name is taken for a misspelt other: `sigmoid_topk` (0.67) is a rule of
its own, not `softmax_topk`."""


def look_up(table: dict[str, Block], name: str, *, kind: str) -> Block:
    """Looks up the block called `name`.

    Args:
        table: name -> block.
        name: what the configuration asks for.
        kind: what the table holds, in the singular, for the message.

    Raises:
        ValueError: the table has no such name; the message names the nearest one.
    """
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=_NEAR)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise ValueError(f"unknown {kind} '{name}'; known: {', '.join(sorted(table))}{hint}")


def add(table: dict[str, Block], name: str, block: Block, *, kind: str) -> None:
    """Registers `block` under `name`.

    Raises:
        ValueError: the name is taken; a block is never replaced.
    """
    if name in table:
        raise ValueError(
            f"{kind} '{name}' is already registered as {table[name]!r}; choose another name"
        )
    table[name] = block
