"""Build the pieces that families share.

Letters are those of docs/glossary.md. Native tensors of a layer are stacked, [L, ...]; those of an
expert twice, [L, e, ...].
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_ext.config import MoEModelConfig
from moe_ext.convert.pieces import (
    Piece,
    Slice,
    all_rows,
    one_row,
    padding_piece,
    reshape_piece,
)

_VOCABULARY_ROWS_PER_PIECE = 8192
"""Embedding rows in a piece: 32 MB in bf16 at a width of 2048."""

EXPERTS = "decoder.layers.mlp.experts"
"""Prefix of the names of the feed-forward experts' native weights."""


def model_pieces(
    model: MoEModelConfig, of_layer: Callable[[int], Iterator[Piece]]
) -> Iterator[Piece]:
    """Yield every block of every native tensor once, in the order of the HF tensors.

    Args:
        model: the architecture.
        of_layer: yields the pieces of a layer, counted from 0.
    """
    yield from vocabulary_pieces(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", model
    )
    for layer in range(model.num_layers):
        yield from of_layer(layer)
    if model.has_norm_weights:
        yield unstacked_piece(
            "decoder.final_layernorm.weight", all_rows("model.norm.weight", model.hidden_size)
        )
    if model.untie_embeddings_and_output_weights:
        yield from vocabulary_pieces("output_layer.weight", "lm_head.weight", model)


def vocabulary_pieces(key: str, name: str, model: MoEModelConfig) -> Iterator[Piece]:
    """Yield the pieces of an embedding or output matrix: native [padded v, h], HF [v, h]."""
    shape = (model.padded_vocab_size, model.hidden_size)
    hf_shape = (model.vocab_size, model.hidden_size)
    for start in range(0, model.vocab_size, _VOCABULARY_ROWS_PER_PIECE):
        count = min(_VOCABULARY_ROWS_PER_PIECE, model.vocab_size - start)
        source = Slice(name=name, shape=hf_shape, start=start, count=count)
        yield reshape_piece(
            key, source, shape=shape, offset=(start, 0), block=(count, model.hidden_size)
        )
    if model.padded_vocab_size > model.vocab_size:
        yield padding_piece(key, shape=shape, offset=(model.vocab_size, 0))


def unstacked_piece(key: str, source: Slice) -> Piece:
    """Map a tensor outside the layers that is equal in both forms."""
    return reshape_piece(
        key, source, shape=source.shape, offset=(0,) * len(source.shape), block=source.shape
    )


def layer_piece(key: str, source: Slice, *, layer: int, num_layers: int) -> Piece:
    """Map a layer's tensor that is equal in both forms: native [L, ...]."""
    return reshape_piece(
        key,
        source,
        shape=(num_layers, *source.shape),
        offset=(layer, *(0,) * len(source.shape)),
        block=(1, *source.shape),
    )


def expert_piece(
    key: str,
    source: Slice,
    *,
    at: tuple[int, int],
    stack: tuple[int, int],
    shape: tuple[int, ...],
) -> Piece:
    """Map one expert's tensor that holds the same values in both forms: native [L, e, ...].

    Args:
        key: native name.
        source: the expert's part of a Hugging Face tensor.
        at: layer and expert.
        stack: layers and experts per layer.
        shape: of the expert's native tensor.
    """
    return reshape_piece(
        key,
        source,
        shape=(*stack, *shape),
        offset=(*at, *(0,) * len(shape)),
        block=(1, 1, *shape),
    )


def expert_pieces(
    key: str,
    name: str,
    *,
    layer: int,
    stack: tuple[int, int],
    hf_shape: tuple[int, ...],
    shape: tuple[int, ...],
) -> Iterator[Piece]:
    """Yield one piece per expert of a layer whose matrices are one tensor in both forms.

    Args:
        key: native name; native [L, e, ...].
        name: Hugging Face name; Hugging Face [e, ...].
        layer: counted from 0.
        stack: layers and experts per layer.
        hf_shape: of an expert's Hugging Face matrix.
        shape: of an expert's native tensor, which holds the same values.
    """
    for expert in range(stack[1]):
        source = one_row(name, expert, stack[1], *hf_shape)
        yield expert_piece(key, source, at=(layer, expert), stack=stack, shape=shape)


def gate_up_piece(
    sources: tuple[Slice, Slice], *, at: tuple[int, int], stack: tuple[int, int]
) -> Piece:
    """Map one expert's two input matrices [f, h], gate then up: native [L, e, 2, f, h].

    Args:
        sources: gate, up.
        at: layer and expert.
        stack: layers and experts per layer.
    """
    matrix = sources[0].shape
    return Piece(
        key=f"{EXPERTS}.weight1",
        shape=(*stack, 2, *matrix),
        offset=(*at, 0, 0, 0),
        block=(1, 1, 2, *matrix),
        sources=sources,
        to_native=_stack_pair,
        to_hf=_split_pair,
    )


def head_group_piece(
    key: str,
    sources: tuple[Slice, ...],
    *,
    layer: int,
    num_layers: int,
    num_groups: int,
) -> Piece:
    """Map projections that share one matrix, rows sorted by head group: native [L, rows, h].

    Of every source [groups x n_i, h], group 0's rows come first, those of all sources together,
    then group 1's: the q heads of a query group, its k head, its v head. Any tensor parallel size
    that divides the groups then splits the matrix between heads.

    Args:
        key: native name.
        sources: matrices [num_groups x n_i, h].
        layer: counted from 0.
        num_layers: L.
        num_groups: ng.
    """
    rows = [source.count // num_groups for source in sources]
    hidden = sources[0].shape[1]
    shape = (num_layers, num_groups * sum(rows), hidden)
    return Piece(
        key=key,
        shape=shape,
        offset=(layer, 0, 0),
        block=(1, *shape[1:]),
        sources=sources,
        to_native=partial(_interleave, num_groups=num_groups),
        to_hf=partial(_separate, num_groups=num_groups, rows=tuple(rows)),
    )


def qkv_piece(model: MoEModelConfig, layer: int) -> Piece:
    """Map the three projections of a layer's self-attention, each a matrix, to one."""
    hf = f"model.layers.{layer}.self_attn"
    h = model.hidden_size
    ng = model.num_query_groups or model.num_attention_heads
    kv = model.head_size * ng
    return head_group_piece(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            all_rows(f"{hf}.q_proj.weight", h, h),
            all_rows(f"{hf}.k_proj.weight", kv, h),
            all_rows(f"{hf}.v_proj.weight", kv, h),
        ),
        layer=layer,
        num_layers=model.num_layers,
        num_groups=ng,
    )


def _stack_pair(sources: Sequence[Tensor]) -> Tensor:
    """Stack [f, h] twice -> [1, 1, 2, f, h]."""
    gate, up = sources
    return torch.stack((gate, up))[None, None]


def _split_pair(block: Tensor) -> list[Tensor]:
    """Split [1, 1, 2, f, h] -> [f, h] twice."""
    return [block[0, 0, 0], block[0, 0, 1]]


def _interleave(sources: Sequence[Tensor], *, num_groups: int) -> Tensor:
    """Interleave by group: [groups x n_i, h] each -> [1, groups x sum of n_i, h]."""
    grouped = [source.unflatten(0, (num_groups, -1)) for source in sources]  # [groups, n_i, h]
    return torch.cat(grouped, dim=1).flatten(0, 1)[None]


def _separate(block: Tensor, *, num_groups: int, rows: tuple[int, ...]) -> list[Tensor]:
    """Undo `_interleave`: [1, groups x sum of n_i, h] -> [groups x n_i, h] each."""
    grouped = block[0].unflatten(0, (num_groups, -1))  # [groups, sum of n_i, h]
    return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]
