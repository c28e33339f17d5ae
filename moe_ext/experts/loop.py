"""Computes experts one after the other with plain autograd: the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """Computes SwiGLU experts over tokens sorted by expert: W2 (silu(Wg x) * (Wu x) * prob).

    Args:
        hidden: [t, h] tokens, those of the first expert first.
        weight1: [el, 2, f, h] gate and up projections.
        weight2: [el, h, f] down projections.
        tokens_per_expert: [el] integers that sum to t, on any device.
        probs: [t] router weights.

    Returns:
        [t, h] of hidden's dtype.
    """
    sizes = tokens_per_expert.tolist()
    outputs = []
    for tokens, weights, (gate, up), down in zip(
        hidden.split(sizes),
        probs.split(sizes),
        weight1.unbind(0),
        weight2.unbind(0),
        strict=True,
    ):
        product = F.silu(tokens @ gate.T) * (tokens @ up.T) * weights.unsqueeze(-1)
        outputs.append(product.to(hidden.dtype) @ down.T)
    return torch.cat(outputs)  # [t, h]


def loop_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix: x W^T.

    Args:
        rows: [t, n], those of the first expert first.
        weight: [el, m, n].
        tokens_per_expert: [el] integers that sum to t, on any device.

    Returns:
        [t, m] of rows' dtype.
    """
    parts = rows.split(tokens_per_expert.tolist())
    return torch.cat(
        [part @ matrix.T for part, matrix in zip(parts, weight.unbind(0), strict=True)]
    )  # [t, m]
