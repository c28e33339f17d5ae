"""Exports a run's adapters: merged into the weights, or as files that peft loads."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.trainer.checkpoint import CheckpointReader, ManifestCheck
from megatron.trainer.errors import CheckpointError
from megatron.trainer.hf_files import HFWriter, new_directory
from megatron.trainer.hf_files.plan import ShardPlan
from megatron.trainer.io.atomic_write import write_durably
from megatron.trainer.io.hashing import DigestThread
from moe_app.convert.checks import guard_disk_space
from moe_app.convert.weights import check_finite
from moe_ext.config import MoEModelConfig
from moe_ext.convert import Piece
from moe_ext.convert.peft_form import delta, merged, peft_config, peft_tensors
from moe_ext.layers.lora import LoRA

logger = logging.getLogger("convert")

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class WeightReader:
    """Reads blocks of a checkpoint's matrices with what their adapters add."""

    reader: CheckpointReader
    """The checkpoint."""
    keys: Mapping[str, str]
    """Its name of each native tensor: the tensor's own, or that of its fp32 master weights."""
    model: MoEModelConfig
    """The architecture."""
    lora: LoRA | None
    """The adapters; None for none."""

    def read(self, piece: Piece) -> Tensor:
        """Return the block of a piece; in fp32 where an adapter is merged into it."""
        block = self._read(piece.key, piece.offset, piece.block)
        if self.lora is None:
            return block
        added = delta(
            piece.key,
            piece.offset,
            piece.block,
            model=self.model,
            lora=self.lora,
            read=self._read,
        )
        return merged(block, added)

    def whole(self, name: str) -> Tensor:
        """Return a native tensor, all layers of it."""
        shape = self.reader.tensors[self.keys[name]].shape
        return self._read(name, (0,) * len(shape), shape)

    def _read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        return self.reader.read(self.keys[name], offset, sizes)


def export_adapter(
    weights: WeightReader, out: Path, *, family: str, dtype: torch.dtype, base: str | None
) -> dict[str, Any]:
    """Write adapter_config.json and adapter_model.safetensors to a new directory.

    Args:
        weights: of a checkpoint with adapters.
        out: the directory.
        family: of the model.
        dtype: to write.
        base: what the configuration says of the model below; None leaves it open.

    Returns:
        Numbers of tensors and bytes, for the report.

    Raises:
        CheckpointError: the checkpoint is corrupt or has no adapters, or the disk is unsuitable.
    """
    lora, model = weights.lora, weights.model
    if lora is None:
        raise CheckpointError(
            f"{weights.reader.path} has no adapters (its run had no --lora-rank); export it"
            " without --adapter"
        )
    tensors = {}
    for name, tensor in peft_tensors(family, model, lora, weights.whole):
        check_finite(tensor, name)
        tensors[name] = tensor.to(dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = peft_config(family, model, lora, base)
    with (
        guard_disk_space(out, shapes, dtype),
        DigestThread() as thread,
        new_directory(out) as directory,
    ):
        write_durably(directory / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        plan = ShardPlan(name=WEIGHTS_NAME, tensors=shapes)
        with HFWriter(directory, [plan], dtype) as writer:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor)
            writer.finish()
        ManifestCheck(weights.reader, thread).finish()
    return {
        "num_tensors": len(tensors),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
