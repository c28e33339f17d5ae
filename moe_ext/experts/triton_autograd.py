"""Wraps the products of `triton_products` in autograd nodes, and decides what they keep."""

import torch
from torch import Tensor

from moe_ext.experts.slots import Mode
from moe_ext.experts.triton_products import (
    SortedRows,
    add_slots,
    gated_product,
    gated_product_gradient,
    grouped_product,
    grouped_weight_gradient,
)
from moe_ext.layers.gradients import accumulation_buffer, mark_added


class Experts(torch.autograd.Function):
    """Computes SwiGLU experts over tokens, or over sorted rows (rows.index is None).

    Differentiable once. Kept for backward: the inputs, and the first product [t * k, 2f].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        rows: SortedRows,
        is_kept: bool,
    ) -> Tensor:
        """Computes [t, h] of tokens [t, h]; all tensors contiguous, gates [t, k] (or [t])."""
        projected, product = gated_product(tokens, weight1, gates, rows, is_kept=is_kept)
        if projected is not None:
            ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
            ctx.rows = rows  # type: ignore[attr-defined]
        slots = grouped_product(product, weight2, rows, read="place", write="row")  # [t * k, h]
        return add_slots(slots, rows.topk)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the first four inputs, those that are needed."""
        tokens, weight1, weight2, gates, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: SortedRows = ctx.rows  # type: ignore[attr-defined]
        needs_tokens, needs_weight1, needs_weight2, needs_gates = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        upstream = grad.contiguous()  # A sum's gradient is one number, expanded.
        grad_projected, grad_gates, product = gated_product_gradient(
            upstream, weight2, gates, projected, rows, is_product_needed=needs_weight2
        )
        grad_weight2 = None
        if product is not None:
            grad_weight2 = _weight_gradient(
                weight2, upstream, product, rows, read_left="token", read_right="place"
            )
        grad_weight1 = None
        if needs_weight1:
            grad_weight1 = _weight_gradient(
                weight1, grad_projected, tokens, rows, read_left="place", read_right="token"
            )
        grad_tokens = None
        if needs_tokens:
            stacked = weight1.flatten(1, 2)  # [el, 2f, h]
            slots = grouped_product(
                grad_projected, stacked, rows, read="place", write="row", is_transposed=True
            )  # [t * k, h]
            grad_tokens = add_slots(slots, rows.topk)
        by_gate = grad_gates.view_as(gates).to(gates.dtype) if needs_gates else None
        return grad_tokens, grad_weight1, grad_weight2, by_gate, None, None


class Projection(torch.autograd.Function):
    """Multiplies by one matrix per expert, with operands in any order.

    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        source: Tensor,
        weight: Tensor,
        rows: SortedRows,
        read: Mode,
        write: Mode,
    ) -> Tensor:
        """Multiplies source [?, n], arranged as `read`, to [?, m], arranged as `write`."""
        ctx.save_for_backward(source, weight)
        ctx.rows, ctx.read, ctx.write = rows, read, write  # type: ignore[attr-defined]
        return _product(source, weight, rows, read, write)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the first two inputs, those that are needed."""
        source, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: SortedRows = ctx.rows  # type: ignore[attr-defined]
        read, write = ctx.read, ctx.write  # type: ignore[attr-defined]
        needs_source, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        upstream = grad.contiguous()  # A sum's gradient is one number, expanded.
        grad_source = grad_weight = None
        if needs_source:
            grad_source = _product(upstream, weight, rows, write, read, is_transposed=True)
        if needs_weight:
            grad_weight = _weight_gradient(
                weight, upstream, source, rows, read_left=write, read_right=read
            )
        return grad_source, grad_weight, None, None, None


def _product(
    source: Tensor,
    weight: Tensor,
    rows: SortedRows,
    read: Mode,
    write: Mode,
    *,
    is_transposed: bool = False,
) -> Tensor:
    """Computes `grouped_product`, whose output can also be summed by token."""
    target: Mode = "row" if write == "token" else write
    output = grouped_product(
        source, weight, rows, read=read, write=target, is_transposed=is_transposed
    )
    return add_slots(output, rows.topk) if write == "token" else output


def _weight_gradient(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    rows: SortedRows,
    *,
    read_left: Mode,
    read_right: Mode,
) -> Tensor:
    """Computes a weight's gradient, into its buffer if it has one, and what backward returns."""
    buffer = accumulation_buffer(weight)
    gradient = torch.empty_like(weight) if buffer is None else buffer
    grouped_weight_gradient(
        left,
        right,
        rows,
        read_left=read_left,
        read_right=read_right,
        out=gradient,
        accumulate=buffer is not None,
    )
    return gradient if buffer is None else mark_added(weight)
