"""Calls torch's attention with tensors as megatron-core has them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Any,
    scale: float | None,
    *,
    is_causal: bool,
) -> Tensor:
    """Attends from all queries to keys.

    Args:
        query: [s, b, np, hn].
        key: [s of the keys, b, ng, hn].
        value: [s of the keys, b, ng, hn].
        visible: bool, or a bias of torch, what a query sees; None with is_causal or for all.
        scale: of scores; None means 1 / sqrt(hn).
        is_causal: a query sees no later position.

    Returns:
        [s, b, np * hn].
    """
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),  # [b, np, s, hn]
        key.permute(1, 2, 0, 3),  # [b, ng, s, hn]
        value.permute(1, 2, 0, 3),  # [b, ng, s, hn]
        attn_mask=visible,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )  # [b, np, s, hn]
    return context.permute(2, 0, 1, 3).flatten(2)


def sees_to_the_end(num_queries: int, num_keys: int) -> Any:
    """Returns the bias with which the last query sees all keys, and each one before it one less."""
    # Here, because it imports torch's compiler, which takes a second and nothing else needs.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_queries, num_keys)
