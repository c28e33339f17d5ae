"""Reads a checkpoint into a sharded state, whatever layout it was saved from."""

import json
import warnings
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)

from megatron.trainer.checkpoint.manifest import require_visible, verify_manifest
from megatron.trainer.checkpoint.safe_load import install_guards
from megatron.trainer.checkpoint.stages import on_all_ranks, on_rank0, torch_errors_explained
from megatron.trainer.errors import CheckpointError
from megatron.trainer.io.bounded_read import is_plain_name, read_small

_SHOWN_KEYS = 10
_MOST_TEXT_BYTES = 1 << 26
_FORMAT_NAME = "metadata.json"
_READ_BY_EVERY_RANK = (_FORMAT_NAME, "common.pt", ".metadata")
_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_UPSTREAM_WARNINGS: dict[str, type[Warning]] = {
    # megatron-core wraps several parts of one tensor in a class that torch would like to retire.
    "Please use DTensor instead": FutureWarning,
    # megatron-core 0.16 calls torch's function by its former name.
    "`load_state_dict` is deprecated": FutureWarning,
    # megatron-core 0.19 gives the reader by position, and lets every rank read for itself.
    "The argument order of load has been changed": UserWarning,
    "torch.distributed is disabled, unavailable or uninitialized": UserWarning,
}


def load_checkpoint(
    path: Path,
    state: dict[str, Any],
    *,
    unread_prefixes: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read what `state` asks for from the checkpoint `path`, executing nothing.

    Called by every rank. Names, sizes and tensor shapes are checked before anything is read;
    `find_checkpoint` compares the contents.

    Args:
        path: a checkpoint directory, as `find_checkpoint` gives it.
        state: this rank's sharded state dict; its tensors are filled in place.
        unread_prefixes: keys of the checkpoint that begin with one of these may stay unread, such
            as "optimizer" when only weights are wanted. Every other key must be asked for.
        group: all ranks; None is the default group.

    Returns:
        The state with its values, plus the unsharded entries of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or unsafe, or holds other keys or other shapes
            than `state` asks for; raised on every rank.
    """
    install_guards()
    on_rank0(f"examining {path}", partial(_check_valid, path), group)
    # A rank that failed to read them before its first collective would leave the others waiting.
    visible = partial(require_visible, path, _READ_BY_EVERY_RANK)
    on_all_ranks(f"examining {path}", visible, group)
    sharded, _ = extract_sharded_base(load_preprocess(state)[0])
    _, wanted = determine_global_metadata(sharded)  # all ranks of the default group
    on_all_ranks("checking the state", partial(validate_sharding_integrity, wanted), group)
    compare = partial(_compare_with, path, wanted, unread_prefixes)
    on_rank0(f"reading the metadata of {path}", compare, group)
    del sharded, wanted
    return on_all_ranks(f"loading {path}", partial(_read, path, state), group)


def read_text(path: Path, name: str) -> str:
    """Read a small text file of the checkpoint `path`, such as config.yaml.

    Raises:
        CheckpointError: there is none of that name, or it is not text.
    """
    if not is_plain_name(name):
        raise CheckpointError(f"{name!r} is not the plain name of a file in {path}")
    try:
        return read_small(path / name, most_bytes=_MOST_TEXT_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else ""
        raise CheckpointError(
            f"{path} holds no {name}" + (f"; it holds {there}" if there else "")
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path / name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read {path / name}: {error}") from error


def _check_valid(path: Path) -> None:
    """Compare names and sizes with the manifest.

    Raises:
        CheckpointError: they differ.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: no such directory")
    problems = verify_manifest(path, checksums=False)
    if problems:
        raise CheckpointError(
            f"{path} is damaged: {_listed(problems)}; take another checkpoint with --ckpt-step"
        )
    _check_format(path)


def _check_format(path: Path) -> None:
    """Refuse other formats than the one that the guards are made for.

    Raises:
        CheckpointError: `metadata.json` names another, or none.
    """
    try:
        told = json.loads(read_text(path, _FORMAT_NAME))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path / _FORMAT_NAME} is not JSON: {error}; take another checkpoint"
        ) from error
    found = {key: told.get(key, "torch") for key in _FORMAT} if isinstance(told, dict) else told
    if found != _FORMAT:
        raise CheckpointError(
            f"{path / _FORMAT_NAME} says that the format is {str(found)[:200]}; only"
            f" {_FORMAT['sharded_backend']} checkpoints can be loaded; take another"
        )
    missing = [name for name in _READ_BY_EVERY_RANK if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} holds no {' and no '.join(missing)}; it is incomplete, or in a form of"
            " megatron-core's own, which is not read; take another checkpoint"
        )


def _compare_with(
    path: Path, wanted: Iterable[Iterable[Any]], unread_prefixes: tuple[str, ...]
) -> None:
    """Compare the keys and shapes in the checkpoint with those that all ranks want.

    Raises:
        CheckpointError: they differ.
    """
    with torch_errors_explained(f"reading the metadata of {path}"):
        stored = TorchDistLoadShardedStrategy().load_sharded_metadata(path)
    asked = {_key(entry): entry for part in wanted for entry in part}
    missing = [key for key in asked if key not in stored]
    unread = [
        key for key in stored if key not in asked and not key.startswith(unread_prefixes or ("\0",))
    ]
    shapes = [
        f"{key}: checkpoint {tuple(stored[key].global_shape)}, this run {tuple(entry.global_shape)}"
        for key, entry in asked.items()
        if key in stored and _differs(entry, stored[key])
    ]
    problems = [
        (missing, "wanted by this run but not in the checkpoint"),
        (unread, "in the checkpoint but not wanted by this run"),
        (shapes, "of another shape"),
    ]
    lines = [f"{len(found)} {what}: {_listed(sorted(found))}" for found, what in problems if found]
    if lines:
        raise CheckpointError(
            f"{path} does not fit this run: {'; '.join(lines)}; use the model configuration of "
            "the run that saved it"
        )


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Let megatron-core read; torch gathers the failures of all ranks before it raises on each."""
    with torch_errors_explained(f"loading {path}"), warnings.catch_warnings():
        for about, category in _UPSTREAM_WARNINGS.items():
            warnings.filterwarnings("ignore", about, category)
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(path), validate_access_integrity=False
        )
    return loaded


def _key(entry: ShardedTensor | ShardedObject) -> str:
    """Return the name under which the checkpoint's metadata lists an entry."""
    return str(entry.unique_key if isinstance(entry, ShardedObject) else entry.key)


def _differs(asked: Any, stored: Any) -> bool:
    """Return whether two entries of one name cannot be the same tensor."""
    if not isinstance(asked, ShardedTensor) or asked.allow_shape_mismatch:
        return False
    return tuple(asked.global_shape) != tuple(stored.global_shape)


def _listed(names: Collection[str]) -> str:
    more = len(names) - _SHOWN_KEYS
    return ", ".join(list(names)[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
