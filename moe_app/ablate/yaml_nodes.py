"""Reads the parts of a YAML file strictly, with messages that name file, line and key."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import yaml

from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.errors import ConfigError

T = TypeVar("T")

_NULL = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[+-]?\d[\d_]*")


@dataclass(frozen=True)
class Place:
    """Holds a node and what it is called in messages."""

    node: yaml.Node
    """The node."""
    path: str
    """Of the file."""
    name: str
    """Of the node: `runs.base.upcycle`."""

    @property
    def where(self) -> str:
        """Return file, line and name."""
        return f"{self.path}:{self.node.start_mark.line + 1}: {self.name}"

    def error(self, rule: str, remedy: str) -> ConfigError:
        """Make an error that shows the value."""
        return ConfigError(f"{self.where} ({self.shown}) {rule}; {remedy}")

    @property
    def shown(self) -> str:
        """Return the value, or what it is."""
        if isinstance(self.node, yaml.ScalarNode):
            return "null" if self.is_null else repr(self.node.value)
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"

    @property
    def is_null(self) -> bool:
        """Return whether nothing is given."""
        plain = isinstance(self.node, yaml.ScalarNode) and self.node.style is None
        return plain and self.node.value in _NULL

    def entries(self, known: Collection[str] | None = None) -> "dict[str, Place]":
        """Return the values of a mapping by key.

        Args:
            known: all keys that there may be; None allows any.

        Raises:
            ConfigError: it is no mapping, or a key is unknown or given twice.
        """
        return read_entries(self.pairs(), self.path, self.name, known)

    def pairs(self) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the nodes of a mapping, none for null."""
        if self.is_null:
            return []
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("must be a mapping", "write `key: value`, one a line")
        return list(self.node.value)

    def items(self) -> "list[Place]":
        """Return the entries of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("must be a list", "write [A, B], or `- A`, one a line")
        return [
            Place(each, self.path, f"{self.name}[{number}]")
            for number, each in enumerate(self.node.value, start=1)
        ]

    def text(self) -> str:
        """Return a text that is not empty."""
        if not isinstance(self.node, yaml.ScalarNode) or self.is_null or not self.node.value:
            raise self.error("must be a text", "write one, in quotes if it looks like a number")
        return str(self.node.value)

    def whole(self, *, least: int) -> int:
        """Return a whole number."""
        value = self.node.value if isinstance(self.node, yaml.ScalarNode) else ""
        if not _WHOLE.fullmatch(value) or int(value) < least:
            raise self.error(f"must be a whole number of at least {least}", "change it")
        return int(value)

    def number(self) -> float:
        """Return a finite number."""
        value = self.node.value if isinstance(self.node, yaml.ScalarNode) else ""
        try:
            found = float(value)
        except ValueError:
            found = float("nan")
        if not abs(found) < float("inf"):
            raise self.error("must be a number", "write digits")
        return found

    def boolean(self) -> bool:
        """Return true or false."""
        value = self.node.value if isinstance(self.node, yaml.ScalarNode) else ""
        if value not in ("true", "false"):
            raise self.error("must be true or false", "write one of them")
        return bool(value == "true")


def read_entries(
    pairs: list[tuple[yaml.Node, yaml.Node]],
    path: str,
    name: str,
    known: Collection[str] | None = None,
) -> dict[str, Place]:
    """Return values by key; see `Place.entries`."""
    found: dict[str, Place] = {}
    for key_node, value_node in pairs:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.tag)
        place = Place(value_node, path, f"{name}.{key}" if name else key)
        where = f"{path}:{key_node.start_mark.line + 1}"
        if known is not None and key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{f' of {name}' if name else ''}"
                f"{did_you_mean(key, known) or '; the keys are ' + ', '.join(known)}"
            )
        if key in found:
            raise ConfigError(f"{where}: {place.name} is given a second time; keep one of them")
        found[key] = place
    return found


def required(entries: dict[str, Place], key: str, *, of: str) -> Place:
    """Return the value of a key that must be there.

    Args:
        entries: of a mapping.
        key: the key.
        of: file and name of the mapping, for the message.

    Raises:
        ConfigError: it is not.
    """
    if key not in entries:
        raise ConfigError(f"{of} has no {key}; it needs one; add it")
    return entries[key]
