"""Computes all experts of a rank in one autograd node: the default backend.

On CUDA in bf16 the products are torch's grouped GEMM (`moe_ext/experts/grouped_gemm.py`). In every
other case the experts take turns (`moe_ext/experts/blockwise.py`).
"""

import torch
from torch import Tensor

from moe_ext.experts.blockwise import (
    blockwise_experts,
    blockwise_projection,
    blockwise_routed_experts,
    blockwise_routed_projection,
)
from moe_ext.experts.grouped_gemm import (
    ROW_ELEMENTS,
    grouped_gemm_experts,
    grouped_gemm_projection,
    grouped_gemm_routed_experts,
    grouped_gemm_routed_projection,
)
from moe_ext.experts.interface import Use
from moe_ext.experts.slots import ExpertOrder, Mode
from moe_ext.kernels.fused import FusedKernels


def grouped_problem(use: Use) -> str | None:
    """Says why the grouped GEMM cannot be used, or None."""
    odd = [width for width in use.widths if width % ROW_ELEMENTS]
    if use.device_type != "cuda" or use.dtype != torch.bfloat16 or not odd:
        return None
    return (
        f"needs rows of a multiple of {ROW_ELEMENTS} numbers on a GPU, but this rank's experts"
        f" have some of {odd[0]}; change hidden_size or moe_ffn_hidden_size, or use 'triton' or"
        " 'loop'"
    )


def grouped_experts(
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    tokens_per_expert: Tensor,
    probs: Tensor,
    *,
    fused_kernels: FusedKernels = "auto",
) -> Tensor:
    """Computes SwiGLU experts over tokens sorted by expert: W2 (silu(Wg x) * (Wu x) * prob).

    Differentiable once. An expert without tokens gets zero gradients.

    Args:
        hidden: [t, h] tokens, those of the first expert first.
        weight1: [el, 2, f, h] gate and up projections.
        weight2: [el, h, f] down projections.
        tokens_per_expert: [el] integers that sum to t, on any device.
        probs: [t] router weights.
        fused_kernels: whether a kernel may compute the activation beside the grouped GEMM.

    Returns:
        [t, h] of hidden's dtype.

    Raises:
        ValueError: h or f does not fit the grouped GEMM.
    """
    if _suits_grouped_gemm(hidden):
        return grouped_gemm_experts(
            hidden, weight1, weight2, tokens_per_expert, probs, fused_kernels=fused_kernels
        )
    return blockwise_experts(hidden, weight1, weight2, tokens_per_expert, probs)


def grouped_routed_experts(
    tokens: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    order: ExpertOrder,
    gates: Tensor,
    *,
    fused_kernels: FusedKernels = "auto",
) -> Tensor:
    """Sends tokens to experts and sums; the contract is `ExpertBackend.routed_experts`'s.

    With `fused_kernels` as `grouped_experts` has it.

    Raises:
        ValueError: h or f does not fit the grouped GEMM.
    """
    if not _suits_grouped_gemm(tokens):
        return blockwise_routed_experts(tokens, weight1, weight2, order, gates)
    return grouped_gemm_routed_experts(
        tokens, weight1, weight2, order, gates, fused_kernels=fused_kernels
    )


def grouped_project_slots(tokens: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies each token by its experts' matrices; see `ExpertBackend.project_slots`.

    Raises:
        ValueError: n or m does not fit the grouped GEMM.
    """
    return _routed_projection(tokens, weight, order, read="token", write="row")


def grouped_project_and_combine(rows: Tensor, weight: Tensor, order: ExpertOrder) -> Tensor:
    """Multiplies rows and sums by token; see `ExpertBackend.project_and_combine`.

    Raises:
        ValueError: n or m does not fit the grouped GEMM.
    """
    return _routed_projection(rows, weight, order, read="row", write="token")


def grouped_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix: x W^T.

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


def _routed_projection(
    source: Tensor, weight: Tensor, order: ExpertOrder, *, read: Mode, write: Mode
) -> Tensor:
    project = (
        grouped_gemm_routed_projection
        if _suits_grouped_gemm(source)
        else blockwise_routed_projection
    )
    return project(source, weight, order, read=read, write=write)


def _suits_grouped_gemm(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype == torch.bfloat16
