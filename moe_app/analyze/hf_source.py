"""Opens a Hugging Face directory as a native model in memory, each rank its own part."""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.checkpoint.manifest import MANIFEST_NAME
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory
from megatron.trainer.io.hashing import add_file, file_sha256
from megatron.trainer.runtime.collective import on_all_ranks, on_rank0
from megatron.trainer.state import model_state
from moe_app.convert.checks import check_size, check_tensors
from moe_app.convert.files import native_config, read_auxiliary_files
from moe_app.convert.surplus import leave_out_surplus
from moe_app.convert.weights import check_finite
from moe_app.infer.open_model import OpenedCheckpoint
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.convert import ExpertLayout, Family, Piece, family_from_config

_DIVISOR = 128
"""The vocabulary is padded to a multiple of it, as an import does."""


def open_hf(args: argparse.Namespace) -> OpenedCheckpoint:
    """Check a Hugging Face directory and read its config; a collective call.

    Raises:
        CheckpointError: it is damaged, or of a family that is not supported.
    """
    path = Path(args.hf)
    saved = on_rank0(f"reading {path}", lambda: _check(path))
    return OpenedCheckpoint(found=FoundCheckpoint(path=path, iteration=0), saved=saved)


def hash_model(path: Path, *, is_hf: bool) -> str:
    """Compute the SHA-256 that names a checkpoint's weights.

    Args:
        path: of a native checkpoint or of a Hugging Face directory.
        is_hf: the latter: its config and weights are hashed.

    Raises:
        UserError: the directory is damaged.
    """
    if not is_hf:
        # A checkpoint's manifest holds the digests of its other files.
        return file_sha256(path / MANIFEST_NAME)
    with HFDirectory(path) as source:
        names = sorted(source.files)
    found = hashlib.sha256()
    for name in ("config.json", *names):
        with (path / name).open("rb") as file:
            add_file(found, file)
    return found.hexdigest()


def fill_from_hf(modules: list[torch.nn.Module], found: FoundCheckpoint) -> None:
    """Fill unwrapped model chunks with the weights of a Hugging Face directory."""
    on_all_ranks(f"reading {found.path}", lambda: _fill(modules, found.path))


def _check(path: Path) -> PretrainConfig:
    """Check every tensor's name, shape and type; return the config of a run with this model."""
    with HFDirectory(path) as source:
        family, model = read_architecture(source)
        leave_out_surplus(source, family.is_rotary_buffer, model)
        total = sum(entry.num_bytes for entry in source.tensors.values())
        check_size(model, total, config=path / "config.json")
        form = family.detect_layout(source.tensors)
        dtype = check_tensors(source, family.hf_tensors(model, form), None)
        return native_config(
            model,
            source.config,
            read_auxiliary_files(path),
            directory=path,
            is_bf16=dtype is torch.bfloat16,
        )


def read_architecture(source: HFDirectory) -> tuple[Family, MoEModelConfig]:
    """Return the family and the native config of a Hugging Face checkpoint.

    Raises:
        CheckpointError: the family or one of its features is not supported.
    """
    try:
        family = family_from_config(source.config)
        return family, family.model_config(source.config, make_vocab_size_divisible_by=_DIVISOR)
    except ValueError as error:
        raise CheckpointError(f"{source.path / 'config.json'}: {error}") from error


def hf_pieces(source: HFDirectory) -> Iterator[Piece]:
    """Yield how the native tensors are made of a directory's."""
    family, model = read_architecture(source)
    form: ExpertLayout = family.detect_layout(source.tensors)
    return family.pieces(model, form)


def read_piece(source: HFDirectory, piece: Piece, dtype: torch.dtype | None = None) -> Tensor:
    """Read a block of a native tensor.

    Raises:
        CheckpointError: a weight is not a finite number, or the file cannot be read.
    """
    parts = [source.read(part.name, start=part.start, count=part.count) for part in piece.sources]
    for part, tensor in zip(piece.sources, parts, strict=True):
        check_finite(tensor, part.name)
    block = piece.to_native(parts)
    return block if dtype is None else block.to(dtype)


def _fill(modules: list[torch.nn.Module], path: Path) -> None:
    """Copy to each local shard its parts of the pieces that overlap it."""
    shards: dict[str, list[ShardedTensor]] = {}
    for shard in _local_shards(modules):
        shards.setdefault(shard.key, []).append(shard)
    missing = {key: sum(each.data.numel() for each in mine) for key, mine in shards.items()}
    with HFDirectory(path) as source, torch.no_grad():
        for piece in hf_pieces(source):
            overlaps = [
                (shard, common)
                for shard in shards.get(piece.key, [])
                if (common := _common(shard, piece)) is not None
            ]
            if not overlaps:
                continue
            block = read_piece(source, piece)
            for shard, common in overlaps:
                target = _with_all_axes(shard)[_window(common, _offset(shard))]
                target.copy_(block[_window(common, piece.offset)])
                missing[piece.key] -= target.numel()
    lacking = [key for key, count in missing.items() if count]
    if lacking:
        raise CheckpointError(
            f"{path} does not fill {', '.join(lacking[:4])}; each weight must come from it once;"
            " import it with tools/convert_checkpoint.py, which says what it lacks"
        )


Box = tuple[tuple[int, int], ...]
"""Begin and end along each axis."""


def _local_shards(modules: list[torch.nn.Module]) -> Iterator[ShardedTensor]:
    state: dict[str, Any] = model_state(modules)
    for value in nested_values(state):
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        for part in nested_values({"part": built}):
            if isinstance(part, ShardedTensor):
                yield part


def _offset(shard: ShardedTensor) -> tuple[int, ...]:
    return tuple(shard.global_offset)


def _with_all_axes(shard: ShardedTensor) -> Tensor:
    """Return the shard's data with the axes that are stacked in the checkpoint, 1 long."""
    data: Tensor = shard.data
    return data.view(*[1] * shard.prepend_axis_num, *data.shape)


def _common(shard: ShardedTensor, piece: Piece) -> Box | None:
    """Return the part of the native tensor that both cover; None if there is none."""
    extent = _with_all_axes(shard).shape
    box = tuple(
        (max(a, b), min(a + n, b + m))
        for a, n, b, m in zip(_offset(shard), extent, piece.offset, piece.block, strict=True)
    )
    return box if all(begin < end for begin, end in box) else None


def _window(box: Box, offset: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - start, end - start) for (begin, end), start in zip(box, offset, strict=True)
    )
