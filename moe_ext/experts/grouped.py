"""Grouped expert compute, the default: all experts of a rank in one autograd node.

On CUDA in bf16 the products are torch's grouped GEMM, whose group sizes stay on the device. In
every other case the experts take turns (`moe_ext/experts/blockwise.py`).
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.blockwise import blockwise_experts, blockwise_projection, blockwise_routed
from moe_ext.experts.gate import GatedActivation
from moe_ext.experts.slots import ExpertOrder, collect_tokens, sort_rows, spread_tokens

if TYPE_CHECKING:
    from moe_ext.experts.backends import Use

# torch's grouped GEMM wants rows of whole 16-byte blocks: 8 elements of bf16.
_ROW_ELEMENTS = 8


def grouped_problem(use: "Use") -> str | None:
    """Why the grouped GEMM cannot be used, or None."""
    odd = [width for width in use.widths if width % _ROW_ELEMENTS]
    if use.device_type != "cuda" or use.dtype != torch.bfloat16 or not odd:
        return None
    return (
        f"needs rows of a multiple of {_ROW_ELEMENTS} numbers on a GPU, but this rank's experts"
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
    rows = grouped_gemm_experts(
        spread_tokens(tokens, order),
        weight1,
        weight2,
        order.tokens_per_expert,
        sort_rows(gates.flatten(), order),
    )  # [t * k, h]
    return collect_tokens(rows, order)


def grouped_gemm_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """`grouped_experts` on torch.nn.functional.grouped_mm (torch 2.10 or newer), bf16, t > 0."""
    local_experts, _, ffn, width = weight1.shape
    _check_sizes({"hidden_size": width, "moe_ffn_hidden_size on this rank": ffn})
    ends = tokens_per_expert.to(hidden.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    stacked = weight1.view(local_experts, 2 * ffn, width).transpose(1, 2)  # [el, h, 2f]
    projected = F.grouped_mm(hidden, stacked, offs=ends)  # [t, 2f]
    product: Tensor = GatedActivation.apply(projected, probs)  # [t, f]
    return F.grouped_mm(product, weight2.transpose(1, 2), offs=ends)  # [t, h]


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


def grouped_gemm_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """`grouped_projection` on torch.nn.functional.grouped_mm (torch 2.10 or newer), bf16, t > 0."""
    _, outputs, inputs = weight.shape
    _check_sizes({"the rows' width": inputs, "an expert's outputs on this rank": outputs})
    ends = tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)  # [t, m]


def _suits_grouped_gemm(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] > 0


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % _ROW_ELEMENTS:
            raise ValueError(
                f"{name} ({size}) must be a multiple of {_ROW_ELEMENTS} for the grouped GEMM; "
                "change it, or use expert_backend 'loop'"
            )
