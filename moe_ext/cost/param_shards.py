"""List the parameters that a rank holds and their gradient buckets, from configs alone.

The order is that of `named_parameters` of a built chunk, in which megatron-core fills its buckets.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_ext.config import MoEModelConfig

_ALIGNMENT = 64
"""The distributed optimizer starts each parameter at a multiple of this many elements,"""
_BUCKET_ALIGNMENT = 128
"""and each bucket at a common multiple of this and of the ranks that share it."""
_SMALLEST_BUCKET = 40_000_000
"""megatron-core's bucket size in elements when reduction overlaps, unless a million per rank is
more."""


class Layout(Protocol):
    """Counts the ranks of each kind of group, as the trainer's `parallel_layout.Layout`."""

    @property
    def tensor(self) -> int:
        """Return the ranks that share an attention or embedding matrix (TP)."""

    @property
    def pipeline(self) -> int:
        """Return the pipeline stages (PP)."""

    @property
    def virtual_stages(self) -> int:
        """Return the model chunks per pipeline rank."""

    @property
    def context(self) -> int:
        """Return the ranks that share each sequence (CP)."""

    @property
    def expert(self) -> int:
        """Return the ranks that hold a layer's experts between them (EP)."""

    @property
    def expert_tensor(self) -> int:
        """Return the ranks that share each expert's matrices (ETP)."""

    @property
    def data(self) -> int:
        """Return the ranks that hold the same dense parameters and read different samples (DP)."""

    @property
    def expert_data(self) -> int:
        """Return the ranks that hold the same experts."""

    @property
    def sequence_parallel(self) -> bool:
        """Return whether activations are split along the sequence between the matrices."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Describes the part of one parameter that a rank holds."""

    name: str
    """Within its layer, or within the model if it belongs to none."""
    numel: int
    """Elements on this rank."""
    is_expert: bool = False
    """Reduced over the ranks that hold the same experts."""
    is_split_sequence: bool = False
    """Under sequence parallelism a rank's gradient covers its part of the sequence only."""
    is_tied: bool = False
    """The embedding, or its copy on the last stage that is tied to it."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Lists the parameters of one of a rank's model chunks."""

    index: int
    """Which of the rank's chunks, from 0."""
    has_embedding: bool
    """Whether it is the model's first."""
    has_head: bool
    """Whether it is the model's last."""
    shards: tuple[Shard, ...]
    """All parameters, in order."""


def model_chunks(model: MoEModelConfig, layout: Layout, stage: int) -> list[Chunk]:
    """Return the chunks of a rank on pipeline stage `stage`, counted from 0."""
    number = layout.virtual_stages
    num_layers = model.num_layers // (layout.pipeline * number)
    found = []
    for index in range(number):
        is_first = stage == 0 and index == 0
        is_last = stage == layout.pipeline - 1 and index == number - 1
        shards = [
            *(_embedding(model, layout) if is_first else ()),
            *(shard for _ in range(num_layers) for shard in layer_shards(model, layout)),
            *(_head(model, layout, is_first=is_first) if is_last else ()),
        ]
        found.append(
            Chunk(index=index, has_embedding=is_first, has_head=is_last, shards=tuple(shards))
        )
    return found


def layer_shards(model: MoEModelConfig, layout: Layout) -> Iterator[Shard]:
    """Yield the parameters of one layer on one rank."""
    h = model.hidden_size
    if model.has_norm_weights:
        yield Shard(name="input_layernorm", numel=h, is_split_sequence=True)
    if model.attention_experts is not None:
        yield from _moa(model, layout, experts=model.attention_experts)
    else:
        yield from _self_attention(model, layout)
    if model.has_norm_weights:
        yield Shard(name="pre_mlp_layernorm", numel=h, is_split_sequence=True)
    if model.num_experts is None:
        yield from _dense_mlp(model, layout, name="mlp", width=model.ffn_hidden_size or 0)
        return
    if model.moe_output_bias:
        yield Shard(name="mlp.output_bias", numel=h, is_split_sequence=True)
    yield Shard(name="mlp.router", numel=model.num_experts * h, is_split_sequence=True)
    matrix = (
        model.num_experts // layout.expert * h * (model.moe_ffn_hidden_size // layout.expert_tensor)
    )
    yield Shard(name="mlp.experts.weight1", numel=2 * matrix, is_expert=True)
    yield Shard(name="mlp.experts.weight2", numel=matrix, is_expert=True)
    if (width := model.moe_shared_expert_intermediate_size) is not None:
        yield from _dense_mlp(model, layout, name="mlp.shared_experts", width=width)


def _dense_mlp(model: MoEModelConfig, layout: Layout, *, name: str, width: int) -> Iterator[Shard]:
    matrix = width // layout.tensor * model.hidden_size
    yield Shard(name=f"{name}.linear_fc1", numel=2 * matrix)
    yield Shard(name=f"{name}.linear_fc2", numel=matrix)


def head_widths(model: MoEModelConfig) -> tuple[int, int]:
    """Return the width of all query heads and of all key heads; for moa, those of one expert."""
    groups = model.num_query_groups or model.num_attention_heads
    size = model.head_size
    heads = groups if model.attention_experts is not None else model.num_attention_heads
    return heads * size, groups * size


def _self_attention(model: MoEModelConfig, layout: Layout) -> Iterator[Shard]:
    queries, keys = (width // layout.tensor for width in head_widths(model))
    yield Shard(name="self_attention.linear_proj", numel=model.hidden_size * queries)
    yield Shard(name="self_attention.linear_qkv", numel=(queries + 2 * keys) * model.hidden_size)
    if model.attention == "full_width_qk_norm" and model.has_norm_weights:
        yield Shard(name="self_attention.q_norm", numel=queries)
        yield Shard(name="self_attention.k_norm", numel=keys)


def _moa(model: MoEModelConfig, layout: Layout, *, experts: int) -> Iterator[Shard]:
    h, width = model.hidden_size, head_widths(model)[1] // layout.tensor
    yield Shard(name="self_attention.output_bias", numel=h, is_split_sequence=True)
    yield Shard(name="self_attention.router", numel=experts * h, is_split_sequence=True)
    yield Shard(name="self_attention.linear_kv", numel=2 * width * h)
    yield Shard(name="self_attention.experts.weight_q", numel=experts * width * h)
    yield Shard(name="self_attention.experts.weight_o", numel=experts * h * width)


def _embedding(model: MoEModelConfig, layout: Layout) -> Iterator[Shard]:
    is_tied = not model.untie_embeddings_and_output_weights and layout.pipeline > 1
    rows = model.padded_vocab_size // layout.tensor
    yield Shard(name="embedding", numel=rows * model.hidden_size, is_tied=is_tied)


def _head(model: MoEModelConfig, layout: Layout, *, is_first: bool) -> Iterator[Shard]:
    if model.has_norm_weights:
        yield Shard(name="final_layernorm", numel=model.hidden_size, is_split_sequence=True)
    is_tied = not model.untie_embeddings_and_output_weights
    if not (is_tied and is_first):
        rows = model.padded_vocab_size // layout.tensor
        yield Shard(name="output_layer", numel=rows * model.hidden_size, is_tied=is_tied)


def bucket_sizes(
    shards: Sequence[Shard], *, num_ranks: int, is_sharded: bool, limit: int | None
) -> list[int]:
    """Return the elements of each bucket of one buffer, padding included.

    Args:
        shards: the parameters in the buffer, in the model's order; it is filled from the back.
        num_ranks: ranks that reduce the buffer.
        is_sharded: whether a distributed optimizer owns it, which pads, and gives a tied embedding
            a bucket of its own.
        limit: elements after which a bucket ends; None means never.
    """

    def padded(number: int, step: int) -> int:
        return -(-number // step) * step if is_sharded else number

    found: list[int] = []
    start = end = 0
    for shard in reversed(shards):
        begin = padded(end, _ALIGNMENT)
        has_own_bucket = shard.is_tied and is_sharded
        if has_own_bucket and end > start:
            closed = padded(begin, math.lcm(num_ranks, _BUCKET_ALIGNMENT))
            found.append(closed - start)
            start = begin = closed
        end = begin + shard.numel
        if has_own_bucket or (limit is not None and end - start >= limit):
            closed = padded(end, math.lcm(num_ranks, _BUCKET_ALIGNMENT))
            found.append(closed - start)
            start = end = closed
    if end > start:
        found.append(padded(end, math.lcm(num_ranks, _BUCKET_ALIGNMENT)) - start)
    return found


def bucket_limit(chunk: Chunk, layout: Layout, *, stage: int, is_overlapped: bool) -> int | None:
    """Return the `limit` of `bucket_sizes` that megatron-core sets for a chunk.

    Only the first chunk of the first stage is split: the others' reductions wait for it anyway.
    """
    if not is_overlapped or stage > 0 or chunk.index > 0:
        return None
    return max(_SMALLEST_BUCKET, 1_000_000 * layout.data)
