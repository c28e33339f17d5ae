"""Compute what a layer of experts keeps for its backward pass, from the config alone."""

from moe_ext.config import MoEModelConfig

_INDEX_BYTES = 8
_GATE_BYTES = 4


def expert_activation_bytes(model: MoEModelConfig, *, element_bytes: int) -> int:
    """Return the bytes per token that one feed-forward layer's experts keep for backward.

    For the backends that keep no activation (`grouped`, `triton`, `cute`), where a rank holds all
    experts: the tokens, which the norm before them computed and nothing else keeps; both
    projections of each of the k rows; the gates; and the row permutation, its inverse and the token
    indices.

        h w + 2 f k w + 4 k + 3 * 8 k    with w bytes per element

    It does not grow with the number of experts. Not counted are the router's own tensors [t, e] and
    buffers that are freed within a pass: a row of h for each of the k slots in forward, and no more
    than that in backward.

    Args:
        model: with experts.
        element_bytes: of an activation (w): 2 in bf16, 4 in fp32.

    Raises:
        ValueError: the model has no experts.
    """
    if model.num_experts is None:
        raise ValueError("the model is dense (num_experts None); ask for one with experts")
    kept = model.hidden_size + 2 * model.moe_ffn_hidden_size * model.moe_router_topk
    rows = (_GATE_BYTES + 3 * _INDEX_BYTES) * model.moe_router_topk
    return kept * element_bytes + rows
