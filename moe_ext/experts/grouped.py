"""Grouped expert compute, the default: all experts of a rank in one pass.

On CUDA in bf16 the products are torch's grouped GEMM, whose group sizes stay on the device. In
every other case each expert's product is written straight into its slice of a shared buffer, with
one autograd node for all experts.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.gate import GatedActivation, gated_backward, gated_forward

# torch's grouped GEMM wants rows of whole 16-byte blocks: 8 elements of bf16.
_ROW_ELEMENTS = 8


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
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and hidden.shape[0] > 0:
        return grouped_gemm_experts(hidden, weight1, weight2, tokens_per_expert, probs)
    output: Tensor = _GroupedExperts.apply(hidden, weight1, weight2, tokens_per_expert, probs)
    return output


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
    if rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] > 0:
        return grouped_gemm_projection(rows, weight, tokens_per_expert)
    output: Tensor = _GroupedProjection.apply(rows, weight, tokens_per_expert)
    return output


def grouped_gemm_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """`grouped_projection` on torch.nn.functional.grouped_mm (torch 2.10 or newer), bf16, t > 0."""
    _, outputs, inputs = weight.shape
    _check_sizes({"the rows' width": inputs, "an expert's outputs on this rank": outputs})
    ends = tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)  # [t, m]


class _GroupedExperts(torch.autograd.Function):
    """All experts as one autograd node; what backward needs of the middle is computed again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        tokens_per_expert: Tensor,
        probs: Tensor,
    ) -> Tensor:
        ends = _row_ends(tokens_per_expert, hidden)
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        projected = _per_expert(hidden, stacked.transpose(1, 2), ends)  # [t, 2f]
        product = gated_forward(projected, probs)  # [t, f]
        output = _per_expert(product, weight2.transpose(1, 2), ends)  # [t, h]
        ctx.save_for_backward(hidden, weight1, weight2, probs, projected)
        ctx.ends = ends  # type: ignore[attr-defined]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight1, weight2, probs, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        ends = ctx.ends  # type: ignore[attr-defined]
        needs_hidden, needs_weight1, needs_weight2, _, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad = grad.contiguous()
        grad_product = _per_expert(grad, weight2, ends)  # [t, f]
        grad_projected, grad_probs, product = gated_backward(grad_product, projected, probs)
        grad_hidden = grad_weight1 = grad_weight2 = None
        if needs_weight2:
            grad_weight2 = _weight_gradient(grad, product, ends)  # [el, h, f]
        if needs_weight1:
            grad_weight1 = _weight_gradient(grad_projected, hidden, ends)  # [el, 2f, h]
            grad_weight1 = grad_weight1.view(weight1.shape)  # [el, 2, f, h]
        if needs_hidden:
            grad_hidden = _per_expert(grad_projected, weight1.flatten(1, 2), ends)  # [t, h]
        return grad_hidden, grad_weight1, grad_weight2, None, grad_probs


class _GroupedProjection(torch.autograd.Function):
    """One matrix per expert as one autograd node."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        tokens_per_expert: Tensor,
    ) -> Tensor:
        ends = _row_ends(tokens_per_expert, rows)
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends  # type: ignore[attr-defined]
        return _per_expert(rows, weight.transpose(1, 2), ends)  # [t, m]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        ends = ctx.ends  # type: ignore[attr-defined]
        needs_rows, needs_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad = grad.contiguous()
        grad_rows = _per_expert(grad, weight, ends) if needs_rows else None  # [t, n]
        grad_weight = _weight_gradient(grad, rows, ends) if needs_weight else None  # [el, m, n]
        return grad_rows, grad_weight, None


def _row_ends(tokens_per_expert: Tensor, rows: Tensor) -> list[int]:
    """Where each expert's rows begin, and the end of the last one's."""
    ends = list(itertools.accumulate(tokens_per_expert.tolist(), initial=0))
    if ends[-1] != rows.shape[0]:
        raise ValueError(
            f"tokens_per_expert sums to {ends[-1]}, but there are {rows.shape[0]} tokens"
        )
    return ends


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % _ROW_ELEMENTS:
            raise ValueError(
                f"{name} ({size}) must be a multiple of {_ROW_ELEMENTS} for the grouped GEMM; "
                "change it, or use expert_backend 'loop'"
            )


def _per_expert(rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    """Multiply each expert's rows by its matrix: [t, m] by [el, m, n] to [t, n]."""
    output = rows.new_empty(rows.shape[0], matrices.shape[-1])
    for matrix, (start, end) in zip(matrices, itertools.pairwise(ends), strict=True):
        if end > start:
            torch.mm(rows[start:end], matrix, out=output[start:end])
    return output


def _weight_gradient(left: Tensor, right: Tensor, ends: list[int]) -> Tensor:
    """left^T right of each expert's rows: [t, m] and [t, n] to [el, m, n], zero without rows."""
    output = left.new_empty(len(ends) - 1, left.shape[-1], right.shape[-1])
    for matrix, (start, end) in zip(output, itertools.pairwise(ends), strict=True):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=matrix)
        else:
            matrix.zero_()
    return output
