"""What a conversion refuses before it writes: weights that do not fit, disks that are too small."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron.trainer.checkpoint import CheckpointReader, layout
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory
from megatron.trainer.optim.sharded_state import MASTER_PREFIX
from moe_ext.config import MoEModelConfig
from moe_ext.convert import Piece
from moe_ext.counting import count_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of --dtype."""

_ROOM = 1.01
"""Bytes on disk per byte of weights, with headers and metadata: at least this much is wanted."""
_SHOWN = 5


def check_size(model: MoEModelConfig, num_bytes: int, *, config: Path) -> None:
    """Refuse a config of a model that the weight files cannot hold, before its tensors are listed.

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
            f" have {num_bytes:,} bytes; they do not belong together, or one is damaged; get the"
            " directory again"
        )


def check_tensors(
    source: HFDirectory, shapes: Mapping[str, tuple[int, ...]], wanted: str | None
) -> torch.dtype:
    """Compare the tensors with those that the config asks for; returns the type to write.

    Raises:
        CheckpointError: some are missing, too many, of another shape, or of several types.
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
        f"{len(names)} tensors {what}: {_listed(names)}"
        for names, what in (
            (missing, "are missing"),
            (extra, "are there that the model has not"),
            (other, "have another shape"),
        )
        if names
    ]
    if extra == ["lm_head.weight"] and len(problems) == 1:
        raise CheckpointError(
            f"{source.path} holds lm_head.weight, but its config.json says tie_word_embeddings"
            " true, which makes the output layer the embedding; remove the tensor if it is a copy,"
            " or set tie_word_embeddings to false if it is not"
        )
    if problems:
        raise CheckpointError(
            f"{source.path} does not hold the weights that its config.json describes:"
            f" {'; '.join(problems)}; a part is missing, or files of two checkpoints are mixed;"
            " download it again"
        )
    if wanted is not None:
        return DTYPES[wanted]
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
    reader: CheckpointReader, pieces: Sequence[Piece], wanted: str | None
) -> tuple[dict[str, str], torch.dtype, str]:
    """Which of a checkpoint's tensors to take for each native one, and the type to write.

    fp32 is taken from the fp32 master weights where there are any: a bf16 run's own are rounded.

    Raises:
        CheckpointError: the checkpoint lacks a weight, or has it in another shape or type.
    """
    shapes = {piece.key: piece.shape for piece in pieces}
    wrong = [
        key
        for key, shape in shapes.items()
        if key not in reader.tensors or reader.tensors[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{reader.path} lacks {len(wrong)} tensors that its config.yaml describes, or has them"
            f" in another shape: {_listed(wrong)}; restore config.yaml, or take another checkpoint"
        )
    kinds = {reader.tensors[key].dtype for key in shapes}
    if len(kinds) != 1 or not kinds <= set(DTYPES.values()):
        raise CheckpointError(
            f"{reader.path} holds weights of the types {', '.join(sorted(map(str, kinds)))}; they"
            " must all be float32 or all bfloat16; take another checkpoint"
        )
    (stored,) = kinds
    dtype = DTYPES[wanted] if wanted is not None else stored
    masters = {key: f"{MASTER_PREFIX}{key}" for key in shapes}
    if (
        dtype is torch.float32
        and stored is torch.bfloat16
        and set(masters.values()) & reader.tensors.keys()
    ):
        lacking = [key for key, master in masters.items() if master not in reader.tensors]
        if lacking:
            raise CheckpointError(
                f"{reader.path} has fp32 master weights, but none of {_listed(lacking)}; take"
                " another checkpoint, or the bf16 weights without --dtype"
            )
        return masters, dtype, "fp32 master weights of a bf16 run"
    return {key: key for key in shapes}, dtype, f"{stored} weights"


def holds(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Whether every number of type `source` is one of type `dtype` too."""
    wide, narrow = torch.finfo(dtype), torch.finfo(source)
    return wide.eps <= narrow.eps and wide.max >= narrow.max


def check_outside(out: Path, checkpoint: Path) -> None:
    """Refuse to write into a checkpoint: what lies there must be what its manifest lists.

    Raises:
        CheckpointError: `out` is in the checkpoint.
    """
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(
            f"{out} lies in the checkpoint {checkpoint}, into which nothing may be written; give"
            " --hf a directory outside it"
        )


def check_new_run(save: Path) -> None:
    """Refuse a directory that holds anything but what a killed conversion has left.

    Raises:
        CheckpointError: it does.
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
            f"{save} exists and holds {_listed(sorted(there))}; nothing is written over: give"
            " --save another directory"
        )


@contextlib.contextmanager
def room_for(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[None]:
    """Refuse to start where the disk is too small, and tell its errors in words.

    Raises:
        CheckpointError: there is no room, or the disk fails.
    """
    needed = int(total_bytes(shapes, dtype) * _ROOM)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    remedy = "make room, or write to another disk"
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
    """Of all the tensors together."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
