"""Estimate temporary tensors, alive for a moment of a step beside kept activations, term by term.

A term counts the tensors that are alive at the peak of a pass; which pass of a layer peaks highest
depends on the sizes, so the largest term is taken.
"""

from moe_ext.cost.activations import (
    StepRank,
    experts_layer,
    holds_all_experts,
    layer_bytes,
    recompute_plan,
    total_bytes,
)
from moe_ext.cost.param_shards import head_widths
from moe_ext.layers.head import tokens_per_chunk

_FP32 = 4


def recomputed_activations(rank: StepRank) -> float:
    """Return the bytes that backward has recomputed before it runs the first layer backward."""
    count = recompute_plan(rank).recomputed
    if count:
        return count * layer_bytes(rank)
    if rank.batch.recompute == "moe" and rank.model.num_experts is not None:
        hidden = rank.own_tokens * rank.model.hidden_size * rank.width
        return total_bytes(experts_layer(rank, experts=rank.model.num_experts)) - hidden
    return 0.0


def head_forward(rank: StepRank) -> float:
    """Return the bytes of a chunk of logits, its gradient and the weight gradient it adds.

    In fp32 the gradient overwrites the logits, and the weight gradient accumulates in place.
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
    """Return the bytes of the hidden states' gradient, scaled and rounded, and of a placeholder."""
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    hidden = rank.tokens * rank.model.hidden_size
    placeholder = (
        rows * rank.model.hidden_size * rank.width if rank.batch.device_type == "cuda" else 0
    )
    return hidden * (_FP32 + rank.width) + placeholder


def layer_workspace(rank: StepRank) -> float:
    """Return the bytes one layer needs in backward, the gradient flowing through it included."""
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    middle = _attention(rank)
    if rank.model.num_experts is not None:
        shared = rank.model.moe_shared_expert_intermediate_size or 0
        middle = max(middle, expert_workspace(rank), _dense(rank, width=shared))
    else:
        middle = max(middle, _dense(rank, width=rank.model.ffn_hidden_size or 0))
    return 2 * hidden + middle


def _attention(rank: StepRank) -> float:
    """Return the bytes of the gradients of output, queries, keys and values, around RoPE."""
    queries, keys = (width // rank.layout.tensor for width in head_widths(rank.model))
    if rank.model.attention_experts is not None:
        queries *= rank.model.attention_topk
    num_bytes = rank.tokens * (2 * queries + 2 * (queries + 2 * keys)) * rank.width
    return float(num_bytes)


def _dense(rank: StepRank, *, width: int) -> float:
    """Return the bytes of the gradients of both halves; kept activations are freed on the way."""
    return float(rank.tokens * 2 * (width // rank.layout.tensor) * rank.width)


def expert_workspace(rank: StepRank) -> float:
    """Return the bytes experts need in backward: all at once (GPU), or one by one (CPU)."""
    model, width = rank.model, rank.width
    ffn = model.moe_ffn_hidden_size // rank.layout.expert_tensor
    local = (model.num_experts or 0) // rank.layout.expert
    rows = rank.received_rows
    of_rows = rows * model.hidden_size * width
    # Rows sent to and received from other ranks.
    moving = 0.0 if holds_all_experts(rank) else 2 * of_rows
    matrix = local * ffn * model.hidden_size * width
    if rank.batch.device_type == "cpu":
        block = rows / local * (2 * model.hidden_size + 8 * ffn) * _FP32
        converted = 3 * ffn * model.hidden_size * _FP32 if rank.batch.bf16 else 0
        return of_rows + moving + block + converted
    gate = of_rows + rows * ffn * (7 * width + _FP32)
    # The weight1 gradient before it is accumulated, placeholders of both, gathered rows.
    weights = 5 * matrix + of_rows + 2 * rows * ffn * width
    tokens = 3 * matrix + 2 * of_rows + 2 * rows * ffn * width
    return moving + max(gate, weights, tokens)
