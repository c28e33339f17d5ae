"""Count parameters and floating-point operations, from the config alone."""

from dataclasses import dataclass

from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Counts parameters of the whole model, including padding rows of the vocabulary."""

    total: int
    """Every parameter."""
    active: int
    """Parameters used per token: k of e experts; embedding and output layer included. What layers
    share is counted once."""
    embedding: int
    """The token embedding, which is looked up, not multiplied."""


def count_parameters(model: MoEModelConfig) -> ParameterCount:
    """Count the parameters of `model`, in total and active per token.

    A self-attention registered from outside is counted as the standard one.
    """
    h = model.hidden_size
    embedding = model.padded_vocab_size * h
    vocabulary = embedding * (2 if model.untie_embeddings_and_output_weights else 1)
    attention, active_attention = _attention_parameters(model)
    dense = 3 * h * (model.ffn_hidden_size or 0) * (model.num_layers - model.num_moe_layers)
    experts, active_experts = _expert_parameters(model)
    copies = min(model.num_moe_layers, 1) if model.moe_share_across_layers else model.num_moe_layers
    norms = (2 * model.num_layers + 1) * h if model.has_norm_weights else 0
    shared = norms + vocabulary + dense
    return ParameterCount(
        total=shared + model.num_layers * attention + copies * experts,
        active=shared + model.num_layers * active_attention + copies * active_experts,
        embedding=embedding,
    )


def _attention_parameters(model: MoEModelConfig) -> tuple[int, int]:
    """Count those of one layer, in total and active per token."""
    h = model.hidden_size
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    head_size = model.head_size
    query_width, key_width = heads * head_size, groups * head_size
    if model.attention_experts is not None:
        expert = 2 * key_width * h  # query projection (one head per key head) and output projection
        router = model.attention_experts * h
        shared = 2 * key_width * h + router + h  # keys and values, router, output bias
        return (
            shared + model.attention_experts * expert,
            shared + model.attention_topk * expert,
        )
    count = h * (query_width + 2 * key_width) + query_width * h
    if model.attention == "full_width_qk_norm" and model.has_norm_weights:
        count += query_width + key_width
    return count, count


def _expert_parameters(model: MoEModelConfig) -> tuple[int, int]:
    """Count those of one feed-forward with experts, in total and active per token."""
    h = model.hidden_size
    if model.num_experts is None:
        return 0, 0
    expert = 3 * h * model.moe_ffn_hidden_size
    shared = model.num_experts * h + (h if model.moe_output_bias else 0)  # router, output bias
    shared += 3 * h * (model.moe_shared_expert_intermediate_size or 0)
    return shared + model.num_experts * expert, shared + model.moe_router_topk * expert


def training_flops_per_token(model: MoEModelConfig, seq_length: int) -> float:
    """Compute the model FLOPs of one token's forward and backward pass.

    6 per active parameter that is multiplied (the output layer is, the embedding is not), as often
    as it is, plus
    12 L np hn s for attention scores and their use; np counts the heads of all k experts of a moa
    attention. Recomputation is not counted, and attention is counted over the full square, as the
    published OLMoE figures do.
    """
    count = count_parameters(model)
    multiplied = count.active - count.embedding
    if model.moe_share_across_layers:
        multiplied += (model.num_moe_layers - 1) * _expert_parameters(model)[1]
    if not model.untie_embeddings_and_output_weights:
        multiplied += count.embedding
    head_size = model.head_size
    attention = 12 * model.num_layers * model.num_attention_heads * head_size * seq_length
    return 6.0 * multiplied + attention
