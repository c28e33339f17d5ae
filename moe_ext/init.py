"""Draws initial weights from the seed and the parameter's name, whatever the layout."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from moe_ext.layers.lora import is_adapter

Fill = Callable[[torch.Tensor, torch.Generator], None]
"""Draws a matrix in place."""


def initialize_weights(
    chunks: list[nn.Module], *, seed: int, std: float, cutoff: float | None
) -> None:
    """Draws every matrix of the model from a normal distribution, in place.

    Each matrix has a random stream of its own, seeded by the run's seed, its global name and its
    layer and expert number; a rank draws the whole matrix on the CPU and keeps its shard. Any
    layout therefore starts from the same bits. Norm weights keep their ones. There is no depth
    scaling (OLMoE, table 10 and appendix B).

    Args:
        chunks: this rank's model chunks, unwrapped (megatron-core modules).
        seed: the run's seed.
        std: standard deviation before truncation.
        cutoff: values beyond this many standard deviations are redrawn; None keeps all.
    """

    def normal(full: torch.Tensor, generator: torch.Generator) -> None:
        if cutoff is None:
            full.normal_(std=std, generator=generator)
            return
        bound = cutoff * std
        nn.init.trunc_normal_(full, std=std, a=-bound, b=bound, generator=generator)

    for shard in weight_shards(chunks):
        if not is_adapter(shard.key):
            _initialize_shard(shard, seed=seed, fill=normal)


def initialize_adapters(chunks: list[nn.Module], *, seed: int) -> None:
    """Draws every A of an adapter evenly from +-1 / sqrt(in), in place; every B is zero.

    The model then computes what it does without adapters. Each matrix has a stream of its own, as
    in `initialize_weights`.

    Args:
        chunks: this rank's model chunks, unwrapped.
        seed: the run's seed.
    """

    def uniform(full: torch.Tensor, generator: torch.Generator) -> None:
        bound = full.shape[-1] ** -0.5
        nn.init.uniform_(full, -bound, bound, generator=generator)

    for shard in weight_shards(chunks):
        if is_adapter(shard.key) and shard.key.endswith(".a"):
            _initialize_shard(shard, seed=seed, fill=uniform)
        elif is_adapter(shard.key) and shard.data is not None:
            nn.init.zeros_(shard.data.detach())


def random_stream(name: str) -> torch.Generator:
    """Returns the generator that a name alone seeds."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def weight_shards(chunks: list[nn.Module]) -> Iterator[ShardedTensor]:
    """Yields this rank's parts of the global tensors."""
    for chunk in chunks:
        for value in nested_values(chunk.sharded_state_dict()):  # type: ignore[operator]
            parts = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in nested_values({"part": parts}):
                if isinstance(part, ShardedTensor):
                    yield part


def _initialize_shard(shard: ShardedTensor, *, seed: int, fill: Fill) -> None:
    """Fills this rank's part of one global tensor.

    The leading `prepend_axis_num` axes of the global shape number layers; stacks of three and more
    dimensions number experts on their first axis.
    """
    prepended = shard.prepend_axis_num
    shape = shard.global_shape[prepended:]
    offset = shard.global_offset[prepended:]
    if len(shape) < 2 or shard.data is None:
        return
    data = shard.data.detach()
    name = f"{shard.key}{list(shard.global_offset[:prepended])}"
    if len(shape) == 2:
        _draw(data, shape, offset, f"{seed}:{name}", fill=fill)
        return
    for index, matrix in enumerate(data):
        stream = f"{seed}:{name}[{offset[0] + index}]"
        _draw(matrix, shape[1:], offset[1:], stream, fill=fill)


def _draw(
    local: torch.Tensor,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    stream: str,
    *,
    fill: Fill,
) -> None:
    """Copies into `local` its slice of the matrix that `stream` names."""
    if local.is_meta:
        return
    full = torch.empty(shape, dtype=torch.float32)
    fill(full, random_stream(stream))
    window = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
    with torch.no_grad():
        local.copy_(full[window])
