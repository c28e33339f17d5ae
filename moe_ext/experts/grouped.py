"""Grouped expert compute, the default: all experts of a rank in one autograd node.

On CUDA in bf16 the products are torch's grouped GEMM (`moe_ext/experts/grouped_gemm.py`). In every
other case the experts take turns (`moe_ext/experts/blockwise.py`).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_ext.experts.blockwise import blockwise_experts, blockwise_projection, blockwise_routed
from moe_ext.experts.grouped_gemm import (
    ROW_ELEMENTS,
    grouped_gemm_experts,
    grouped_gemm_projection,
    grouped_gemm_routed,
)
from moe_ext.experts.slots import ExpertOrder

if TYPE_CHECKING:
    from moe_ext.experts.backends import Use


def grouped_problem(use: "Use") -> str | None:
    """Why the grouped GEMM cannot be used, or None."""
    odd = [width for width in use.widths if width % ROW_ELEMENTS]
    if use.device_type != "cuda" or use.dtype != torch.bfloat16 or not odd:
        return None
    return (
        f"needs rows of a multiple of {ROW_ELEMENTS} numbers on a GPU, but this rank's experts"
        f" have some of {odd[0]}; change hidden_size or moe_ffn_hidden_size, or use 'triton' or"
        " 'loop'"
    )


def grouped_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """SwiGLU experts over tokens sorted by expert: W2 (silu(Wg x) * (Wu x) * prob).

    Differentiable once. An expert without tokens gets zero gradients.

    Args:
        hidden: [t, h] tokens, those of the first expert first.
        weight1: [el, 2, f, h] gate and up projections.
        weight2: [el, h, f] down projections.
        tokens_per_expert: [el] integers that sum to t, on any device.
        probs: [t] router weights.

    Returns:
        [t, h] of hidden's dtype.

    Raises:
        ValueError: h or f does not fit the grouped GEMM.
    """
    if _suits_grouped_gemm(hidden):
        return grouped_gemm_experts(hidden, weight1, weight2, tokens_per_expert, probs)
    return blockwise_experts(hidden, weight1, weight2, tokens_per_expert, probs)


def grouped_routed(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Gather, experts, weighted sum; the contract is `ExpertBackend.routed`'s.

    Raises:
        ValueError: h or f does not fit the grouped GEMM.
    """
    if not _suits_grouped_gemm(tokens):
        return blockwise_routed(tokens, weight1, weight2, order, gates)
    return grouped_gemm_routed(tokens, weight1, weight2, order, gates)


def grouped_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix: x W^T.

    Differentiable once. An expert without rows gets a zero gradient.

    Args:
        rows: [t, n], those of the first expert first.
        weight: [el, m, n].
        tokens_per_expert: [el] integers that sum to t, on any device.

    Returns:
        [t, m] of rows' dtype.

    Raises:
        ValueError: n or m does not fit the grouped GEMM.
    """
    if _suits_grouped_gemm(rows):
        return grouped_gemm_projection(rows, weight, tokens_per_expert)
    return blockwise_projection(rows, weight, tokens_per_expert)


def _suits_grouped_gemm(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16
