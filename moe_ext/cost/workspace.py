"""Tensors that exist for a moment of a step only, beside what is kept: an estimate, term by term.

A term counts the tensors that are alive at once where a pass needs most; which pass of a layer that
is depends on the sizes, so the largest term is taken.
"""

from moe_ext.cost.activations import (
    StepRank,
    experts_layer,
    is_local,
    layer_total,
    layers_of,
    received_rows,
    total,
)
from moe_ext.cost.param_shards import head_widths
from moe_ext.layers.head import tokens_per_chunk

_FP32 = 4


def recomputed(rank: StepRank) -> float:
    """What backward has computed again when it begins with its first layer."""
    again = layers_of(rank).again
    if again:
        return again * layer_total(rank)
    if rank.batch.recompute == "moe" and rank.model.num_experts is not None:
        hidden = rank.own_tokens * rank.model.hidden_size * rank.width
        return total(experts_layer(rank, experts=rank.model.num_experts)) - hidden
    return 0.0


def head_forward(rank: StepRank) -> float:
    """A chunk of logits, its gradient as it is multiplied, and the product that is added.

    In fp32 the gradient is the logits' memory, and the product goes straight to its place.
    """
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    logits = tokens_per_chunk(rank.tokens, rows, rank.batch.device_type) * rows
    weight = rows * rank.model.hidden_size
    if not rank.batch.bf16:
        return logits * _FP32
    if rank.batch.converts_bf16:
        return (logits + weight) * _FP32
    # A CPU converts the product before it adds it.
    of_product = rank.width + (_FP32 if rank.batch.device_type == "cpu" else 0)
    return logits * (_FP32 + rank.width) + weight * of_product


def head_backward(rank: StepRank) -> float:
    """The hidden states' gradient, scaled and rounded; and a placeholder for the weight's."""
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    hidden = rank.tokens * rank.model.hidden_size
    placeholder = (
        rows * rank.model.hidden_size * rank.width if rank.batch.device_type == "cuda" else 0
    )
    return hidden * (_FP32 + rank.width) + placeholder


def layer_workspace(rank: StepRank) -> float:
    """Backward of one layer, the gradient that flows through it included."""
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    middle = _attention(rank)
    if rank.model.num_experts is not None:
        middle = max(middle, expert_workspace(rank))
    else:
        middle = max(middle, _dense(rank))
    return 2 * hidden + middle


def _attention(rank: StepRank) -> float:
    """Gradients of what attention found, of queries, keys and values, before and after RoPE."""
    queries, keys = (width // rank.layout.tensor for width in head_widths(rank.model))
    if rank.model.attention_experts is not None:
        queries *= rank.model.attention_topk
    whole = rank.tokens * (2 * queries + 2 * (queries + 2 * keys)) * rank.width
    return float(whole)


def _dense(rank: StepRank) -> float:
    """Gradients of both halves; what is kept of them goes as they come."""
    ffn = (rank.model.ffn_hidden_size or 0) // rank.layout.tensor
    return float(rank.tokens * 2 * ffn * rank.width)


def expert_workspace(rank: StepRank) -> float:
    """Backward of a layer's experts: all at once (GPU), or one after the other (CPU)."""
    model, width = rank.model, rank.width
    ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
    local = (model.num_experts or 0) // rank.layout.expert
    rows = received_rows(rank)
    of_rows = rows * model.hidden_size * width
    # Rows on their way from and to other ranks.
    moving = 0.0 if is_local(rank) else 2 * of_rows
    matrix = local * ffn * model.hidden_size * width
    if rank.batch.device_type == "cpu":
        block = rows / local * (2 * model.hidden_size + 8 * ffn) * _FP32
        converted = 3 * ffn * model.hidden_size * _FP32 if rank.batch.bf16 else 0
        return of_rows + moving + block + converted
    gate = of_rows + rows * ffn * (7 * width + _FP32)
    # The product of weight1's gradient, placeholders of both, gathered rows.
    weights = 5 * matrix + of_rows + 2 * rows * ffn * width
    tokens = 3 * matrix + 2 * of_rows + 2 * rows * ffn * width
    return moving + max(gate, weights, tokens)
