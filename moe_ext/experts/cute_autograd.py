"""Wraps the products of `cute_products` in autograd nodes, and decides what they keep."""

import torch
from torch import Tensor

from moe_ext.experts import cute_products
from moe_ext.experts.cute_products import ALIGNMENT, RaggedRows
from moe_ext.experts.slots import Mode
from moe_ext.layers.gradients import accumulation_buffer, mark_added


class CuteExperts(torch.autograd.Function):
    """Computes SwiGLU experts over tokens, or over sorted rows (rows.rows is None).

    Differentiable once. Kept for backward: the inputs, the first product [t * k, 2f], and two
    indices of [t * k]. The router's gradient is a sum that backward's epilogue has anyway, so the
    experts' outputs are not kept.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        rows: RaggedRows,
        is_kept: bool,
    ) -> Tensor:
        """Computes [t, h] of tokens [t, h]; all tensors contiguous, gates [t, k] (or [t])."""
        projected, product = cute_products.gated_product(
            tokens, weight1, _by_place(gates, rows), rows, rows.lines("token"), is_kept=is_kept
        )
        if projected is not None:
            ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
            ctx.rows = rows  # type: ignore[attr-defined]
        output = cute_products.grouped_product(product, weight2, rows, None)  # [t * k, h]
        return _arrange(output, rows, "token")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the first four inputs, those that are needed."""
        tokens, weight1, weight2, gates, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: RaggedRows = ctx.rows  # type: ignore[attr-defined]
        needs_tokens, needs_weight1, needs_weight2, needs_gates = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        upstream = grad.contiguous()  # A sum's gradient is one number, expanded.
        lines = rows.lines("token")
        grad_projected, grad_places, product = cute_products.gated_product_gradient(
            upstream, weight2, _by_place(gates, rows), projected, rows, lines
        )
        grad_weight2 = None
        if needs_weight2:
            grad_weight2 = _weight_gradient(weight2, upstream, product, rows, lines)
        grad_weight1 = None
        if needs_weight1:
            # What is read through the index becomes rows of the result: that is transposed.
            grad_weight1 = _weight_gradient(
                weight1, tokens, grad_projected, rows, lines, is_transposed=True, is_gated=True
            )
        grad_tokens = None
        if needs_tokens:
            by_place = cute_products.grouped_product(
                grad_projected,
                weight1.flatten(1, 2),  # [el, 2f, h]
                rows,
                None,
                is_transposed=True,
                is_interleaved=True,
            )  # [t * k, h]
            grad_tokens = _arrange(by_place, rows, "token")
        by_gate = None
        if needs_gates:
            by_gate = _arrange(grad_places, rows, "row").view_as(gates).to(gates.dtype)
        return grad_tokens, grad_weight1, grad_weight2, by_gate, None, None


class CuteProjection(torch.autograd.Function):
    """Multiplies by one matrix per expert, with operands in any order.

    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        source: Tensor,
        weight: Tensor,
        rows: RaggedRows,
        read: Mode,
        write: Mode,
    ) -> Tensor:
        """Multiplies source [?, n], arranged as `read`, to [?, m], arranged as `write`."""
        ctx.save_for_backward(source, weight)
        ctx.rows, ctx.read, ctx.write = rows, read, write  # type: ignore[attr-defined]
        output = cute_products.grouped_product(source, weight, rows, rows.lines(read))
        return _arrange(output, rows, write)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradients of the first two inputs, those that are needed."""
        source, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: RaggedRows = ctx.rows  # type: ignore[attr-defined]
        read, write = ctx.read, ctx.write  # type: ignore[attr-defined]
        needs_source, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        upstream, lines = grad.contiguous(), rows.lines(write)
        grad_source = grad_weight = None
        if needs_weight:
            # Only one operand is read through an index, so the other is put in place.
            at = rows.lines(read)
            placed = source if at is None else source.index_select(0, at)  # [t * k, n]
            grad_weight = _weight_gradient(weight, upstream, placed, rows, lines)
        if needs_source:
            by_place = cute_products.grouped_product(
                upstream, weight, rows, lines, is_transposed=True
            )  # [t * k, n]
            grad_source = _arrange(by_place, rows, read)
        return grad_source, grad_weight, None, None, None


def _by_place(gates: Tensor, rows: RaggedRows) -> Tensor:
    """Sorts [t, k] gates by expert to [t * k]; without an index they are sorted."""
    return gates if rows.rows is None else gates.flatten().index_select(0, rows.rows)


def _arrange(sorted_rows: Tensor, rows: RaggedRows, mode: Mode) -> Tensor:
    """Arranges rows [t * k, ...] by place as `mode` says; by token they are summed."""
    if rows.places is None or mode == "place":
        return sorted_rows
    if mode == "token":
        return cute_products.add_rows(sorted_rows, rows.places, rows.topk)
    return sorted_rows.index_select(0, rows.places)


def _weight_gradient(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    rows: RaggedRows,
    lines: Tensor | None,
    *,
    is_transposed: bool = False,
    is_gated: bool = False,
) -> Tensor:
    """Computes a weight's gradient, into its buffer if it has one, and what backward returns.

    Args:
        weight: [el, m, n], or [el, 2, f, n] if it is gated.
        left: [?, m], read through lines; [?, n] if transposed.
        right: [t * k, n] by place; [t * k, m] if transposed, interleaved if gated.
        rows: of both.
        lines: of left.
        is_transposed: see left and right.
        is_gated: see weight.
    """
    buffer = accumulation_buffer(weight)
    if buffer is not None and buffer.data_ptr() % ALIGNMENT:
        buffer = None  # TMA could not add to it; megatron-core does.
    gradient = torch.empty_like(weight) if buffer is None else buffer
    # A view or an error: what is added to a copy would be lost.
    matrices = gradient.view(gradient.shape[0], -1, gradient.shape[-1])  # [el, m, n]
    cute_products.grouped_weight_gradient(
        left,
        right,
        rows,
        lines,
        out=matrices.mT if is_transposed else matrices,
        accumulate=buffer is not None,
        is_interleaved=is_gated,
    )
    return gradient if buffer is None else mark_added(weight)
