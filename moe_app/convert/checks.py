"""Check a conversion before it writes: weights that do not match, disks that are too small."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron.trainer.checkpoint import CheckpointReader, layout
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory
from megatron.trainer.optim.sharded_state import MASTER_PREFIX
from moe_ext.config import MoEModelConfig
from moe_ext.counting import count_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of --dtype."""

_DISK_FACTOR = 1.01
"""Bytes required on disk per byte of weights, for headers and metadata."""
_MAX_NAMES = 5


def check_size(model: MoEModelConfig, num_bytes: int, *, config: Path) -> None:
    """Refuse a config too large for its weight files, before its tensors are listed.

    Args:
        model: what the config describes.
        num_bytes: of the weights in the files.
        config: its file, for the message.

    Raises:
        CheckpointError: there is less than one byte for every two parameters, of at least two
            bytes each.
    """
    total = count_parameters(replace(model, make_vocab_size_divisible_by=1)).total
    if total > 2 * num_bytes:
        raise CheckpointError(
            f"{config} describes a model of {total:,} parameters, but the weights beside it"
            f" have {num_bytes:,} bytes; they do not match, or one is corrupt; download or copy"
            " the directory again"
        )


def check_tensors(
    source: HFDirectory, shapes: Mapping[str, tuple[int, ...]], requested: str | None
) -> torch.dtype:
    """Compare the tensors with those of the config; return the dtype to write.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape, or of several types.
    """
    tensors = source.tensors
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    other = [
        f"{name} (config.json {shape}, file {tensors[name].shape})"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {_join_names(names)}"
        for names, what in (
            (missing, "are missing"),
            (extra, "are unexpected"),
            (other, "have another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.path} does not hold the weights that its config.json describes:"
            f" {'; '.join(problems)}; files are missing, or those of two checkpoints are mixed;"
            " download it again"
        )
    if requested is not None:
        return DTYPES[requested]
    kinds = {entry.dtype: name for name, entry in tensors.items()}
    (dtype, name), *rest = kinds.items()
    if rest:
        raise CheckpointError(
            f"{source.path} mixes types: {name} is {dtype}, {rest[0][1]} is {rest[0][0]}; weights"
            " must be of one type; convert them to one with --dtype"
        )
    if dtype not in DTYPES.values():
        raise CheckpointError(
            f"the weights in {source.path} are {dtype}; a run trains in bf16 or fp32; give --dtype"
            " fp32 (exact) or --dtype bf16"
        )
    return dtype


def choose_weights(
    reader: CheckpointReader,
    shapes: Mapping[str, tuple[int, ...]],
    requested: str | None,
    *,
    is_frozen: Callable[[str], bool],
) -> tuple[dict[str, str], torch.dtype, str]:
    """Return the checkpoint tensor for each native one, the dtype to write, and a description.

    fp32 weights come from the fp32 master weights if present: a bf16 run's own are rounded. What a
    run froze has none, and is exact as it is.

    Args:
        reader: the checkpoint.
        shapes: of the native tensors by name.
        requested: value of --dtype.
        is_frozen: whether the run left a tensor as it was, by its name.

    Raises:
        CheckpointError: the checkpoint lacks a weight, or has it in another shape or type.
    """
    wrong = [
        key
        for key, shape in shapes.items()
        if key not in reader.tensors or reader.tensors[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{reader.path} lacks {len(wrong)} tensors that its config.yaml describes, or has them"
            f" in another shape: {_join_names(wrong)}; restore config.yaml, or take another"
            " checkpoint"
        )
    kinds = {reader.tensors[key].dtype for key in shapes}
    if len(kinds) != 1 or not kinds <= set(DTYPES.values()):
        raise CheckpointError(
            f"{reader.path} holds weights of the types {', '.join(sorted(map(str, kinds)))}; they"
            " must all be float32 or all bfloat16; take another checkpoint"
        )
    (stored,) = kinds
    dtype = DTYPES[requested] if requested is not None else stored
    masters = {key: f"{MASTER_PREFIX}{key}" for key in shapes}
    if (
        dtype is torch.float32
        and stored is torch.bfloat16
        and set(masters.values()) & reader.tensors.keys()
    ):
        frozen = {key for key in shapes if is_frozen(key)}
        lacking = [
            key
            for key, master in masters.items()
            if master not in reader.tensors and key not in frozen
        ]
        if lacking:
            raise CheckpointError(
                f"{reader.path} has fp32 master weights, but none of {_join_names(lacking)}; take"
                " another checkpoint, or the bf16 weights without --dtype"
            )
        chosen = {key: key if key in frozen else masters[key] for key in shapes}
        return chosen, dtype, "fp32 master weights of a bf16 run"
    return {key: key for key in shapes}, dtype, f"{stored} weights"


def can_represent(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Return whether every value of dtype `source` is also one of `dtype`."""
    wide, narrow = torch.finfo(dtype), torch.finfo(source)
    return wide.eps <= narrow.eps and wide.max >= narrow.max


def check_outside(out: Path, checkpoint: Path) -> None:
    """Refuse to write into a checkpoint, whose manifest lists all of its files.

    Raises:
        CheckpointError: `out` is in the checkpoint.
    """
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(
            f"{out} lies in the checkpoint {checkpoint}, which must not be modified; give --hf"
            " a directory outside it"
        )


def check_new_run(save: Path) -> None:
    """Refuse a directory that holds anything but leftovers of a killed conversion.

    Raises:
        CheckpointError: it holds something else.
    """
    if not os.path.lexists(save):
        return
    leftovers = layout.directory_name(0) + ".tmp-"
    there = (
        [entry.name for entry in save.iterdir() if not entry.name.startswith(leftovers)]
        if save.is_dir()
        else [save.name]
    )
    if there:
        raise CheckpointError(
            f"{save} exists and holds {_join_names(sorted(there))}; nothing is overwritten: give"
            " --save another directory"
        )


@contextlib.contextmanager
def guard_disk_space(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[None]:
    """Refuse to start on a too small disk, and translate disk errors.

    Raises:
        CheckpointError: there is too little space, or the disk fails.
    """
    needed = int(total_bytes(shapes, dtype) * _DISK_FACTOR)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    remedy = "free some space, or write to another disk"
    if free < needed:
        raise CheckpointError(
            f"{path} needs {needed:,} bytes, but its disk has {free:,} free; {remedy}"
        )
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(there).free
            raise CheckpointError(
                f"the disk of {path} is full: {needed:,} bytes are needed in all, {free:,} are free"
                f" after the unfinished part was removed; {remedy}"
            ) from error
        raise CheckpointError(
            f"cannot write {error.filename or path}: {error.strerror}; give a directory that this"
            " user may write to"
        ) from error


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the bytes of all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def _join_names(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
