"""Write an upcycled model as a run at iteration 0, a matrix at a time.

Weights of layers that are alike are stacked, [L, ...]; where some stay dense, each weight has its
layer's number in its name, as the trainer has them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.trainer.checkpoint import CheckpointStream, streamed_checkpoint
from megatron.trainer.checkpoint.saved_run import RUN_NAME, WEIGHTS_ONLY
from megatron.trainer.config.cli import dump_config
from megatron.trainer.io.hashing import DigestThread
from megatron.trainer.records.run_dir import CONFIG_NAME
from moe_app.convert.checks import guard_disk_space
from moe_app.convert.weights import Progress, check_finite
from moe_app.upcycle.dense_source import DenseSource
from moe_ext.config import MoEModelConfig
from moe_ext.upcycling import Upcycling

_LAYERS = "decoder.layers."
_FC1, _FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_SHARED_FC1, _SHARED_FC2 = (
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
)
_ROUTER = "mlp.router.weight"
_IN, _OUT = "mlp.experts.weight1", "mlp.experts.weight2"

LayerBlock = tuple[str, tuple[int, ...], Tensor]
"""Name within the layer, offset in the layer's weight, and values."""


def write_run(source: DenseSource, rule: Upcycling, model: MoEModelConfig, save: Path) -> None:
    """Write the checkpoint of the new run.

    Args:
        source: the dense model.
        rule: how experts come from it.
        model: what it becomes.
        save: the run's directory.

    Raises:
        CheckpointError: the disk is unsuitable, or a weight is not finite.
    """
    shapes = _shapes(source, rule, model)
    origin = {WEIGHTS_ONLY: True, "iteration": 0, "upcycled_from": str(source.path)}
    is_bf16 = source.dtype is torch.bfloat16
    cfg = replace(source.cfg, model=model, training=replace(source.cfg.training, bf16=is_bf16))
    files: dict[str, str | bytes] = {
        **source.files,
        CONFIG_NAME: dump_config(cfg),
        RUN_NAME: json.dumps(origin, indent=2) + "\n",
    }
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * source.dtype.itemsize
    with (
        guard_disk_space(save, shapes, source.dtype),
        DigestThread() as thread,
        Progress("upcycle", total) as progress,
        streamed_checkpoint(
            save, 0, shapes=shapes, dtype=source.dtype, files=files, digests=thread
        ) as stream,
    ):
        out = _Output(stream, progress, source.dtype, is_numbered=model.has_dense_layers)
        for key in source.shapes:
            if not key.startswith(_LAYERS):
                for block in source.blocks(key):
                    out.write(key, block[1], source.read(*block))
        for layer in range(model.num_layers):
            for name, offset, values in _layer_blocks(source, rule, model, layer):
                out.write_layer(layer, name, offset, values)


def _shapes(
    source: DenseSource, rule: Upcycling, model: MoEModelConfig
) -> dict[str, tuple[int, ...]]:
    """Return the global name and shape of every weight of the new model."""
    found = {key: shape for key, shape in source.shapes.items() if not key.startswith(_LAYERS)}
    for layer in range(model.num_layers):
        for name, shape in _layer_shapes(source, rule, model, layer).items():
            if model.has_dense_layers:
                found[f"{_LAYERS}{layer}.{name}"] = shape
            else:
                found[f"{_LAYERS}{name}"] = (model.num_layers, *shape)
    return found


def _layer_shapes(
    source: DenseSource, rule: Upcycling, model: MoEModelConfig, layer: int
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights of one layer, counted from 0."""
    dense = {
        key.removeprefix(_LAYERS): shape[1:]
        for key, shape in source.shapes.items()
        if key.startswith(_LAYERS)
    }
    if not rule.makes_experts(layer):
        return dense
    h, f = model.hidden_size, model.moe_ffn_hidden_size
    fc1, fc2 = dense.pop(_FC1), dense.pop(_FC2)
    dense[_ROUTER] = (rule.num_experts, h)
    if rule.shared:
        dense |= {_SHARED_FC1: fc1, _SHARED_FC2: fc2}
    return {**dense, _IN: (rule.num_experts, 2, f, h), _OUT: (rule.num_experts, h, f)}


def _layer_blocks(
    source: DenseSource, rule: Upcycling, model: MoEModelConfig, layer: int
) -> Iterator[LayerBlock]:
    """Yield the weights of one layer, counted from 0, an expert at a time."""
    is_dense = not rule.makes_experts(layer)
    for name, shape in _layer_shapes(source, rule, model, layer).items():
        if is_dense or not name.startswith("mlp."):
            yield name, (0,) * len(shape), _read(source, name, layer)
    if is_dense:
        return
    yield _ROUTER, (0, 0), rule.router(layer, model.hidden_size, model.init_method_std)
    fc1, fc2 = (_read(source, name, layer) for name in (_FC1, _FC2))
    if rule.shared:
        into, down = rule.shared_expert(fc1, fc2)
        yield _SHARED_FC1, (0, 0), into
        yield _SHARED_FC2, (0, 0), down
    for expert in range(rule.num_experts):
        into, down = rule.expert(layer, expert, fc1, fc2)
        yield _IN, (expert, 0, 0, 0), into[None]
        yield _OUT, (expert, 0, 0), down[None]


def _read(source: DenseSource, name: str, layer: int) -> Tensor:
    """Return a weight of one layer."""
    key = f"{_LAYERS}{name}"
    shape = source.shapes[key][1:]
    return source.read(key, (layer, *(0,) * len(shape)), (1, *shape))[0]


class _Output:
    """Writes blocks, of finite numbers, and counts their bytes.

    Args:
        stream: the checkpoint.
        progress: counts.
        dtype: to write.
        is_numbered: whether names have the layer's number.
    """

    def __init__(
        self,
        stream: CheckpointStream,
        progress: Progress,
        dtype: torch.dtype,
        *,
        is_numbered: bool,
    ) -> None:
        self._stream, self._progress, self._dtype = stream, progress, dtype
        self._is_numbered = is_numbered

    def write(self, key: str, offset: tuple[int, ...], block: Tensor) -> None:
        """Write a block of a weight."""
        cast = block.to(self._dtype)
        check_finite(cast, key)
        self._stream.write(key, offset, cast)
        self._progress.advance(cast.nbytes)

    def write_layer(self, layer: int, name: str, offset: tuple[int, ...], block: Tensor) -> None:
        """Write a block of a layer's weight."""
        if self._is_numbered:
            self.write(f"{_LAYERS}{layer}.{name}", offset, block)
        else:
            self.write(f"{_LAYERS}{name}", (layer, *offset), block[None])
