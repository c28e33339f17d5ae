"""Assigns the tensors of a checkpoint to files."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron.trainer.errors import ConfigError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ENDLESS = 2**63


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Describes a safetensors file to write."""

    name: str
    """Of the file."""
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes by name, in the order of their bytes."""


def plan_shards(
    tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, max_bytes: int
) -> list[ShardPlan]:
    """Assign tensors to files in order, filling each up to `max_bytes`.

    Args:
        tensors: shapes by name.
        dtype: of all of them.
        max_bytes: of tensors in a file; a single tensor above it has a file of its own.
    """
    groups: list[dict[str, tuple[int, ...]]] = []
    room = -1
    for name, shape in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = shape
        room -= num_bytes
    if len(groups) == 1:
        return [ShardPlan(name=SINGLE_NAME, tensors=groups[0])]
    return [
        ShardPlan(name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=group)
        for number, group in enumerate(groups, start=1)
    ]


def index_text(plans: Sequence[ShardPlan], dtype: torch.dtype) -> str:
    """Build the index of files by tensor."""
    num_values = sum(math.prod(shape) for plan in plans for shape in plan.tensors.values())
    index = {
        "metadata": {"total_parameters": num_values, "total_size": num_values * dtype.itemsize},
        "weight_map": {tensor: plan.name for plan in plans for tensor in plan.tensors},
    }
    return json.dumps(index, indent=2) + "\n"


def parse_size(text: str) -> int:
    """Parse a size in bytes: "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]I?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < _ENDLESS:
        raise ConfigError(
            f"{text!r} is no size of a file; give a number of bytes above 0, with KB, MB, GB"
            " (powers of 1000), KiB, MiB or GiB (of 1024); 5GB, for example"
        )
    return int(size)
