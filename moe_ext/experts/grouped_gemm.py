"""Experts on torch's grouped GEMM: one product for all; group sizes stay on the device.

As in `moe_ext/experts/blockwise.py`, what is kept for backward is the tokens and `projected`
[rows, 2f]: rows are gathered and the activation is computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.gate import gated_backward, gated_forward
from moe_ext.experts.slots import ExpertOrder, sort_gates, sum_slots, unsort_gates
from moe_ext.layers.gradients import accumulation_buffer, mark_added

ROW_ELEMENTS = 8
"""The grouped GEMM wants rows of whole 16-byte blocks: 8 elements of bf16."""


def grouped_gemm_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """SwiGLU experts over sorted rows, bf16; the contract is `grouped_experts`'s."""
    return _experts(hidden, weight1, weight2, tokens_per_expert, probs, order=None)


def grouped_gemm_routed(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Gather, experts, weighted sum, bf16; the contract is `ExpertBackend.routed`'s."""
    return _experts(tokens, weight1, weight2, order.tokens_per_expert, gates, order=order)


def grouped_gemm_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Each expert's rows by its matrix, bf16; the contract is `grouped_projection`'s."""
    _, outputs, inputs = weight.shape
    _check_sizes({"the rows' width": inputs, "an expert's outputs on this rank": outputs})
    output: Tensor = _Projection.apply(rows, weight, _ends(tokens_per_expert, rows))
    return output


def _experts(
    tokens: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    counts: Tensor,
    gates: Tensor,
    *,
    order: ExpertOrder | None,
) -> Tensor:
    _, _, ffn, width = weight1.shape
    _check_sizes({"hidden_size": width, "moe_ffn_hidden_size on this rank": ffn})
    ends = _ends(counts, tokens)
    output: Tensor = _Experts.apply(tokens, weight1, weight2, gates, order, ends)
    return output


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        order: ExpertOrder | None,
        ends: Tensor,
    ) -> Tensor:
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        projected = _product(_rows(tokens, order), stacked.mT, ends)  # [t, 2f]
        product = gated_forward(projected, sort_gates(gates, order))  # [t, f]
        output = _product(product, weight2.mT, ends)  # [t, h]
        ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
        ctx.order, ctx.ends = order, ends  # type: ignore[attr-defined]
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
        grad_projected, grad_probs, product = gated_backward(
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
        return grad_tokens, grad_weight1, grad_weight2, grad_gates, None, None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor, ends: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends  # type: ignore[attr-defined]
        return _product(rows, weight.mT, ends)  # [t, m]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        ends: Tensor = ctx.ends  # type: ignore[attr-defined]
        needs_rows, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad = grad.contiguous()
        grad_rows = _product(grad, weight, ends) if needs_rows else None  # [t, n]
        grad_weight = _weight_gradient(weight, grad, rows, ends) if needs_weight else None
        return grad_rows, grad_weight, None


def _rows(source: Tensor, order: ExpertOrder | None) -> Tensor:
    return source if order is None else source.index_select(0, order.tokens)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """[t, n] by [el, n, m], each row by its expert's."""
    if len(rows) == 0:
        return rows.new_empty(0, matrices.shape[2])
    return F.grouped_mm(rows, matrices, offs=ends)


def _weight_gradient(weight: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left^T right of each expert's rows, for a weight of as many numbers as [el, m, n].

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
    """[el] int32, on the rows' device."""
    return tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0, dtype=torch.int32)


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size % ROW_ELEMENTS:
            raise ValueError(
                f"{name} ({size}) must be a multiple of {ROW_ELEMENTS} for the grouped GEMM; "
                "change it, or use expert_backend 'loop'"
            )
