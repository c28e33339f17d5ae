"""Computes experts on torch's grouped GEMM, one product for all; sizes stay on the device.

As in `moe_ext/experts/blockwise.py`, what is kept for backward is the tokens and `projected`
[rows, 2f]: rows are gathered and the activation is computed again. torch's grouped GEMM cannot add
to what is in memory: a weight's gradient is a bf16 tensor first, added to its buffer in one pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.gate import gated_backward, gated_forward
from moe_ext.experts.slots import (
    ExpertOrder,
    Mode,
    arrange,
    lines_of,
    sort_gates,
    sum_slots,
    unsort_gates,
)
from moe_ext.kernels import fused
from moe_ext.kernels.fused import FusedKernels
from moe_ext.kernels.routed_unit import routed_unit, routed_unit_gradient
from moe_ext.layers.gradients import accumulation_buffer, mark_added

ROW_ELEMENTS = 8
"""The grouped GEMM wants rows of whole 16-byte blocks: 8 elements of bf16."""


def grouped_gemm_experts(
    hidden: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    tokens_per_expert: Tensor,
    probs: Tensor,
    *,
    fused_kernels: FusedKernels = "auto",
) -> Tensor:
    """Computes SwiGLU experts over sorted rows, bf16; the contract is `grouped_experts`'s."""
    return _experts(hidden, weight1, weight2, tokens_per_expert, probs, None, fused_kernels)


def grouped_gemm_routed_experts(
    tokens: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    order: ExpertOrder,
    gates: Tensor,
    *,
    fused_kernels: FusedKernels = "auto",
) -> Tensor:
    """Sends tokens to experts and sums, bf16; see `ExpertBackend.routed_experts`."""
    counts = order.tokens_per_expert
    return _experts(tokens, weight1, weight2, counts, gates, order, fused_kernels)


def grouped_gemm_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix, bf16; see `grouped_projection`."""
    _check_matrix(weight)
    ends = _ends(tokens_per_expert, rows)
    output: Tensor = _GemmProjection.apply(rows, weight, None, ends, "place", "place")
    return output


def grouped_gemm_routed_projection(
    source: Tensor, weight: Tensor, order: ExpertOrder, *, read: Mode, write: Mode
) -> Tensor:
    """Multiplies rows found through the order, bf16; see `blockwise_routed_projection`."""
    _check_matrix(weight)
    ends = _ends(order.tokens_per_expert, source)
    output: Tensor = _GemmProjection.apply(source, weight, order, ends, read, write)
    return output


def _experts(
    tokens: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    counts: Tensor,
    gates: Tensor,
    order: ExpertOrder | None,
    fused_kernels: FusedKernels,
) -> Tensor:
    _, _, ffn, width = weight1.shape
    _check_sizes({"hidden_size": width, "moe_ffn_hidden_size on this rank": ffn})
    ends = _ends(counts, tokens)
    output: Tensor = _GemmExperts.apply(tokens, weight1, weight2, gates, order, ends, fused_kernels)
    return output


class _GemmExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        order: ExpertOrder | None,
        ends: Tensor,
        fused_kernels: FusedKernels,
    ) -> Tensor:
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        projected = _product(_rows(tokens, order), stacked.mT, ends)  # [t, 2f]
        probs = sort_gates(gates, order)
        in_kernels = fused.takes(fused_kernels, projected, probs)
        product = (routed_unit if in_kernels else gated_forward)(projected, probs)  # [t, f]
        output = _product(product, weight2.mT, ends)  # [t, h]
        ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
        ctx.order, ctx.ends = order, ends  # type: ignore[attr-defined]
        ctx.in_kernels = in_kernels  # type: ignore[attr-defined]
        return output if order is None else sum_slots(output, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weight1, weight2, gates, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        order: ExpertOrder | None = ctx.order  # type: ignore[attr-defined]
        ends: Tensor = ctx.ends  # type: ignore[attr-defined]
        needs_tokens, needs_weight1, needs_weight2 = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        upstream = _rows(grad.contiguous(), order)  # [t, h]
        backward = routed_unit_gradient if ctx.in_kernels else gated_backward  # type: ignore[attr-defined]
        grad_projected, grad_probs, product = backward(
            _product(upstream, weight2, ends), projected, sort_gates(gates, order)
        )
        grad_weight2 = _weight_gradient(weight2, upstream, product, ends) if needs_weight2 else None
        del upstream, product
        grad_weight1 = None
        if needs_weight1:
            grad_weight1 = _weight_gradient(weight1, grad_projected, _rows(tokens, order), ends)
        grad_tokens = None
        if needs_tokens:
            grad_tokens = _product(grad_projected, weight1.flatten(1, 2), ends)  # [t, h]
            if order is not None:
                grad_tokens = sum_slots(grad_tokens, order)
        grad_gates = unsort_gates(grad_probs, gates, order)
        return grad_tokens, grad_weight1, grad_weight2, grad_gates, None, None, None


class _GemmProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        source: Tensor,
        weight: Tensor,
        order: ExpertOrder | None,
        ends: Tensor,
        read: Mode,
        write: Mode,
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.order, ctx.ends = order, ends  # type: ignore[attr-defined]
        ctx.read, ctx.write = read, write  # type: ignore[attr-defined]
        output = _product(_rows(source, order, read), weight.mT, ends)  # [t * k, m]
        return output if order is None else arrange(output, order, write)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        order: ExpertOrder | None = ctx.order  # type: ignore[attr-defined]
        ends: Tensor = ctx.ends  # type: ignore[attr-defined]
        read, write = ctx.read, ctx.write  # type: ignore[attr-defined]
        needs_source, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        upstream = _rows(grad.contiguous(), order, write)  # [t * k, m]
        grad_source = grad_weight = None
        if needs_source:
            grad_source = _product(upstream, weight, ends)  # [t * k, n]
            if order is not None:
                grad_source = arrange(grad_source, order, read)
        if needs_weight:
            grad_weight = _weight_gradient(weight, upstream, _rows(source, order, read), ends)
        return grad_source, grad_weight, None, None, None, None


def _rows(source: Tensor, order: ExpertOrder | None, mode: Mode = "token") -> Tensor:
    """Gathers rows in sorted order, from a source that is arranged as `mode` says."""
    lines = None if order is None else lines_of(order, mode)
    return source if lines is None else source.index_select(0, lines)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiplies rows [t, n] by their experts' matrices [el, n, m]."""
    if len(rows) == 0:
        return rows.new_empty(0, matrices.shape[2])
    return F.grouped_mm(rows, matrices, offs=ends)


def _weight_gradient(weight: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Computes left^T right of each expert's rows, for a weight of as many numbers as [el, m, n].

    It goes into the weight's buffer if there is one, also when there are no rows: DDP must not
    take one micro-batch's gradient from the buffer and another's from autograd.
    """
    buffer = accumulation_buffer(weight)
    if len(left):
        gradient = F.grouped_mm(left.T, right, offs=ends).view_as(weight)
        if buffer is None:
            return gradient
        buffer.add_(gradient)
    elif buffer is None:
        return torch.zeros_like(weight)
    return mark_added(weight)


def _ends(tokens_per_expert: Tensor, rows: Tensor) -> Tensor:
    """Computes where each expert's rows end: [el] int32, on the rows' device."""
    return tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)


def _check_matrix(weight: Tensor) -> None:
    _, outputs, inputs = weight.shape
    _check_sizes({"the rows' width": inputs, "an expert's outputs on this rank": outputs})


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % ROW_ELEMENTS:
            raise ValueError(
                f"{name} ({size}) must be a multiple of {ROW_ELEMENTS} for the grouped GEMM; "
                "change it, or use expert_backend 'loop'"
            )
