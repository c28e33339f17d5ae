"""Hides how the supported lines of megatron-core differ in what the trainer calls.

`moe_ext.compat` does the same for models, and has the versions that are supported. Each function
says which versions need which branch. Everything marked 0.16 can go on the day Python 3.11 is given
up (its support ends in October 2027), because 0.16.1 is the last release for it.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from torch import Tensor


def guard_common_state(
    load_common: Callable[[str | Path], Any], refuse_sharded_objects: Callable[[str | Path], Any]
) -> None:
    """Replace megatron-core's readers of the unsharded state, and of objects in files of their own.

    0.16: two methods of `TorchCommonLoadStrategy`. 0.19: `load_common`, which `serialization` has
    imported by name; objects in files of their own are gone.

    Args:
        load_common: reads `common.pt` in a directory.
        refuse_sharded_objects: raises, given a directory.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    if Version(version("megatron-core")) >= Version("0.19"):
        common.load_common = load_common
        serialization.load_common = load_common
        return

    def load_common_method(_self: object, directory: str | Path) -> Any:
        return load_common(directory)

    def load_objects_method(_self: object, _state: object, directory: str | Path) -> Any:
        return refuse_sharded_objects(directory)

    common.TorchCommonLoadStrategy.load_common = load_common_method
    common.TorchCommonLoadStrategy.load_sharded_objects = load_objects_method


def gradients_for_norm(optimizer: Any) -> list[Tensor]:
    """Return the gradients of this rank that count in the norm, each weight's on one rank alone.

    0.16: `get_main_grads_for_grad_norm`. 0.19: `get_grads_for_grad_norm`, which leaves out weights
    that are marked for a norm of their own; there are none here.

    Args:
        optimizer: one of a `ChainedOptimizer`, after `prepare_grads`.
    """
    if Version(version("megatron-core")) >= Version("0.19"):
        return list(optimizer.get_grads_for_grad_norm())
    return list(optimizer.get_main_grads_for_grad_norm())
