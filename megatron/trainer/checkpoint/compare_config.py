"""Compares the configuration in a checkpoint with that of the run that loads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.trainer.errors import CheckpointError

_ABSENT = object()


def compare_configs(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the differences between two configurations, a line each.

    Args:
        saved: the checkpoint's; nested mappings are compared field by field.
        wanted: this run's. A list equals a tuple of the same items: YAML knows no tuples.

    Returns:
        Lines such as "num_layers: checkpoint 4, this run 6", by name.
    """
    left, right = _flat(saved), _flat(wanted)
    return [
        f"{name}: checkpoint {_shown(left, name)}, this run {_shown(right, name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, _ABSENT) != right.get(name, _ABSENT)
    ]


def config_mismatch(path: Path, differences: Sequence[str]) -> CheckpointError:
    """Return the error for a checkpoint of another configuration; it names every difference.

    Args:
        path: the checkpoint.
        differences: what `compare_configs` gave; at least one.
    """
    lines = "".join(f"\n  {line}" for line in differences)
    return CheckpointError(
        f"{path} was saved by a run with another configuration:{lines}\n"
        f"set these to the checkpoint's values (its own are in {path / 'config.yaml'}), or start "
        "without --load"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name, sequences as tuples."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            leaves.update(_flat(value, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = _frozen(value)
    return leaves


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    return str(leaves[name]) if name in leaves else "not set"
