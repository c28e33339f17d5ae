"""What a layer of experts keeps for its backward pass, from the config alone."""

from moe_ext.config import MoEModelConfig

_INDEX_BYTES = 8
_GATE_BYTES = 4


def expert_activation_bytes(model: MoEModelConfig, *, element_bytes: int) -> int:
    """Bytes a token that the experts of one feed-forward layer keep between forward and backward.

    Of the backends that keep no activation (`grouped`, `triton`), where a rank holds all experts:
    the tokens, which the norm before them has made and nobody else keeps; both projections of each
    of the k rows; the router's weights; and the order of the rows, there and back and by token.

        h w + 2 f k w + 4 k + 3 * 8 k    with w bytes an element

    Nothing of it grows with the number of experts. The router's own tensors [t, e] are not
    counted, nor buffers that are free again when a pass ends: a row of h for each of the k slots
    in forward, the same and no more in backward.

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
