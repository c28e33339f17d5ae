"""Read a dense model block by block, from a run or from a Hugging Face directory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron.trainer.checkpoint import CheckpointReader, find_checkpoint, layout
from megatron.trainer.data.tokenizer_files import IDENTITY_FILES, TOKENIZER_FILES
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFDirectory
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.convert.checks import check_size, check_tensors, choose_weights
from moe_app.convert.files import native_config, read_auxiliary_files, read_those_there
from moe_app.convert.surplus import leave_out_surplus
from moe_app.pretrain.config import PretrainConfig, read_saved_config
from moe_ext.convert import dense, dense_config
from moe_ext.convert.family import is_rotary_buffer
from moe_ext.convert.pieces import Piece

_ROWS = 8192
"""Of an embedding, in a block."""

Block = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name, offset and sizes."""


class ReadBlock(Protocol):
    """Reads a part of a native tensor."""

    def __call__(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return it; it must not be changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenseSource:
    """Holds an open dense model."""

    path: Path
    """Directory that it is read from."""
    cfg: PretrainConfig
    """Config of a run that would have written it."""
    shapes: dict[str, tuple[int, ...]]
    """Global name and shape of every weight."""
    dtype: torch.dtype
    """Of the weights to write."""
    files: dict[str, bytes]
    """The tokenizer's files, by name."""
    read: ReadBlock
    """Reads weights."""

    def blocks(self, key: str) -> Iterator[Block]:
        """Yield a tensor outside of the layers in blocks: some rows of an embedding."""
        shape = self.shapes[key]
        for start in range(0, shape[0], _ROWS):
            sizes = (min(_ROWS, shape[0] - start), *shape[1:])
            yield key, (start, *(0,) * (len(shape) - 1)), sizes


@contextlib.contextmanager
def open_run(
    load: Path, *, iteration: int | None, dtype: str | None, prog: str
) -> Iterator[DenseSource]:
    """Open the checkpoint of a run.

    Raises:
        UserError: there is none, it is damaged, or its weights are adapters and a base.
    """
    found = find_checkpoint(load, iteration=iteration)
    cfg = read_saved_config(found.path / CONFIG_NAME, prog=prog)
    if cfg.trainable.lora is not None:
        raise CheckpointError(
            f"{found.path} trains adapters of rank {cfg.trainable.lora.rank} beside its weights;"
            " a model to upcycle must be whole; load the run that it was fine-tuned from"
        )
    with CheckpointReader(found.path) as reader:
        check_size(cfg.model, reader.num_bytes, config=found.path / CONFIG_NAME)
        shapes = {
            key: stored.shape
            for key, stored in reader.tensors.items()
            if key.startswith(("decoder.", "embedding.", "output_layer."))
        }
        keys, chosen, _ = choose_weights(
            reader,
            shapes,
            dtype,
            is_frozen=lambda name: cfg.trainable.is_frozen(name, cfg.model),
        )
        own = Path(cfg.data.tokenizer_model or "").name
        names = dict.fromkeys((own, *TOKENIZER_FILES.values(), *IDENTITY_FILES))
        yield DenseSource(
            path=found.path,
            cfg=cfg,
            shapes=shapes,
            dtype=chosen,
            files=read_those_there(found.path, [name for name in names if name]),
            read=lambda key, offset, sizes: reader.read(keys[key], offset, sizes),
        )


@contextlib.contextmanager
def open_hf(path: Path, *, save: Path, dtype: str | None, divisor: int) -> Iterator[DenseSource]:
    """Open a Hugging Face directory of a dense LLaMA or OLMo.

    Args:
        path: the directory.
        save: run directory of the model to be made, where its tokenizer will be.
        dtype: of the weights to write; None keeps it.
        divisor: the vocabulary is padded to a multiple of this.

    Raises:
        CheckpointError: its config or its weights are not those of such a model.
    """
    with HFDirectory(path) as source:
        where = source.path / "config.json"
        try:
            model = dense_config(source.config, make_vocab_size_divisible_by=divisor)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        leave_out_surplus(source, is_rotary_buffer, model)
        total = sum(entry.num_bytes for entry in source.tensors.values())
        check_size(model, total, config=where)
        pieces = list(dense.make_pieces(model))
        hf_shapes = {part.name: part.shape for piece in pieces for part in piece.sources}
        chosen = check_tensors(source, hf_shapes, dtype)
        auxiliary = read_auxiliary_files(source.path)
        yield DenseSource(
            path=source.path,
            cfg=native_config(
                model,
                source.config,
                auxiliary,
                directory=layout.final_path(save, 0),
                is_bf16=chosen is torch.bfloat16,
            ),
            shapes={piece.key: piece.shape for piece in pieces},
            dtype=chosen,
            files=dict(auxiliary.files),
            read=_HFBlocks(source, pieces),
        )


class _HFBlocks:
    """Reads blocks of native tensors, each within one layer or across rows of an embedding."""

    def __init__(self, source: HFDirectory, pieces: list[Piece]) -> None:
        self._source = source
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.key, []).append(piece)

    def __call__(self, key: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        begin, end = offset[0], offset[0] + sizes[0]
        rows = []
        for piece in self._pieces[key]:
            first, last = piece.offset[0], piece.offset[0] + piece.block[0]
            if first < end and begin < last:
                parts = [
                    self._source.read(part.name, start=part.start, count=part.count)
                    for part in piece.sources
                ]
                block = piece.to_native(parts)
                rows.append(block[max(begin - first, 0) : end - first])
        inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], sizes[1:], strict=True))
        kind = rows[0].dtype  # padding is fp32
        return torch.cat([each.to(kind) for each in rows])[(slice(None), *inner)]
