"""Computes experts one after the other, each with its block of rows: for CPUs.

There is one pass over the experts forward and one backward; each expert's rows stay in cache.
An expert's rows are gathered, multiplied, gated and multiplied again before the next expert's are
touched, so that everything element-wise finds its operands in cache, and the permuted tokens are
never written to memory. What is kept for backward is `projected` [rows, 2f]; tokens are gathered
and the activation is computed again, which costs less than reading either back would.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.gate import gated_backward, gated_forward
from moe_ext.experts.scratch import Scratch
from moe_ext.experts.slots import (
    ExpertOrder,
    Mode,
    arrange,
    lines_of,
    sort_gates,
    sum_slots,
    unsort_gates,
)
from moe_ext.layers.gradients import accumulation_buffer, mark_added
from moe_ext.layers.products import add_product, multiply


def blockwise_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """Computes SwiGLU experts over sorted rows; the contract is `grouped_experts`'s."""
    sizes = _sizes(tokens_per_expert, hidden.shape[0])
    output: Tensor = _BlockwiseExperts.apply(hidden, weight1, weight2, probs, None, sizes)
    return output


def blockwise_routed_experts(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Sends tokens to experts and sums; the contract is `ExpertBackend.routed_experts`'s."""
    sizes = _sizes(order.tokens_per_expert, len(order.rows))
    output: Tensor = _BlockwiseExperts.apply(tokens, weight1, weight2, gates, order, sizes)
    return output


def blockwise_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Multiplies each expert's rows by its matrix; the contract is `grouped_projection`'s."""
    sizes = _sizes(tokens_per_expert, rows.shape[0])
    output: Tensor = _BlockwiseProjection.apply(rows, weight, None, sizes, "place", "place")
    return output


def blockwise_routed_projection(
    source: Tensor, weight: Tensor, order: ExpertOrder, *, read: Mode, write: Mode
) -> Tensor:
    """Multiplies each row of `source`, found through the order, by its expert's matrix.

    Args:
        source: [t, n] or [t * k, n], arranged as `read` says.
        weight: [el, m, n].
        order: of the t * k rows.
        read: "token" or "row".
        write: "token", which sums, or "row".

    Returns:
        [t, m] or [t * k, m].
    """
    number = len(source) * order.topk if read == "token" else len(source)
    sizes = _sizes(order.tokens_per_expert, number)
    output: Tensor = _BlockwiseProjection.apply(source, weight, order, sizes, read, write)
    return output


class _Rows:
    """Reads rows expert by expert, in the dtype that products are computed in.

    Args:
        source: [t, n] or [t * k, n], or the sorted rows themselves.
        order: how rows come from the source; None where it has them sorted.
        sizes: rows of each expert.
        mode: how the source is arranged.
    """

    def __init__(
        self, source: Tensor, order: ExpertOrder | None, sizes: list[int], mode: Mode = "token"
    ) -> None:
        self._source = source
        lines = None if order is None else lines_of(order, mode)
        self._is_sorted = lines is None
        self._parts = (source if lines is None else lines).split(sizes)
        self.scratch = Scratch.for_products(source, max(sizes, default=0))

    def read(self, expert: int) -> Tensor:
        """Returns the rows [n, h] of this expert, filled up with zeros to `working_rows`.

        They are valid until the next expert's are read.
        """
        part = self._parts[expert]
        if self._is_sorted:
            return self.scratch.fill("rows", part)
        if self._source.dtype != self.scratch.dtype:
            return self.scratch.fill("rows", self._source.index_select(0, part))
        filled, rows = self.scratch.take_filled("rows", len(part), self._source.shape[1])
        torch.index_select(self._source, 0, part, out=rows)
        return filled


class _BlockwiseExperts(torch.autograd.Function):
    """Computes SwiGLU experts as one autograd node."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        order: ExpertOrder | None,
        sizes: list[int],
    ) -> Tensor:
        rows = _Rows(tokens, order, sizes)
        probs = sort_gates(gates, order)  # [rows]
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        projected = tokens.new_empty(len(probs), stacked.shape[1])
        output = tokens.new_empty(len(probs), tokens.shape[1])
        parts = zip(
            _matrices(stacked.mT, rows.scratch.dtype),
            _matrices(weight2.mT, rows.scratch.dtype),
            projected.split(sizes),
            probs.split(sizes),
            output.split(sizes),
            strict=True,
        )
        for expert, (into, out_of, kept, prob, result) in enumerate(parts):
            if len(prob):
                first = _multiply_kept(rows, expert, into(), kept)  # [n, 2f]
                product = gated_forward(first, _lengthen(prob, len(first)), rows.scratch)
                multiply(product, out_of(), result)
        ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
        ctx.order, ctx.sizes = order, sizes  # type: ignore[attr-defined]
        return output if order is None else sum_slots(output, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weight1, weight2, gates, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        order: ExpertOrder | None = ctx.order  # type: ignore[attr-defined]
        sizes: list[int] = ctx.sizes  # type: ignore[attr-defined]
        needs_tokens, needs_weight1, needs_weight2 = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        rows, gradients = _Rows(tokens, order, sizes), _Rows(grad.contiguous(), order, sizes)
        scratch = rows.scratch
        probs = sort_gates(gates, order)  # [rows]
        grad_probs = torch.empty_like(probs)
        grad_rows = tokens.new_empty(len(probs), tokens.shape[1] if needs_tokens else 0)
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        into1 = _WeightGradient(weight1, stacked.shape, sizes) if needs_weight1 else None
        into2 = _WeightGradient(weight2, weight2.shape, sizes) if needs_weight2 else None
        parts = zip(
            _matrices(stacked, rows.scratch.dtype),
            _matrices(weight2, rows.scratch.dtype),
            projected.split(sizes),
            probs.split(sizes),
            grad_probs.split(sizes),
            grad_rows.split(sizes),
            strict=True,
        )
        for expert, (into, out_of, kept, prob, grad_prob, grad_row) in enumerate(parts):
            if not len(prob):
                continue
            upstream = gradients.read(expert)  # [n, h]
            grad_product = scratch.take("grad_output", len(upstream), weight2.shape[2])
            grad_projected, of_prob, product = gated_backward(
                torch.mm(upstream, out_of(), out=grad_product),  # [n, f]
                scratch.fill("projected", kept),
                _lengthen(prob, len(upstream)),
                scratch,
            )
            grad_prob.copy_(of_prob[: len(prob)])
            if into2 is not None:
                into2.add(expert, upstream.T, product)  # [h, f]
            if into1 is not None:
                into1.add(expert, grad_projected.T, rows.read(expert))  # [2f, h]
            if needs_tokens:
                multiply(grad_projected, into(), grad_row)
        if order is not None and needs_tokens:
            grad_rows = sum_slots(grad_rows, order)  # [t, h]
        return (
            grad_rows if needs_tokens else None,
            into1.result() if into1 is not None else None,
            into2.result() if into2 is not None else None,
            unsort_gates(grad_probs, gates, order),
            None,
            None,
        )


class _BlockwiseProjection(torch.autograd.Function):
    """Multiplies by one matrix per expert as one autograd node; kept are operand and weight."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        source: Tensor,
        weight: Tensor,
        order: ExpertOrder | None,
        sizes: list[int],
        read: Mode,
        write: Mode,
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.order, ctx.sizes = order, sizes  # type: ignore[attr-defined]
        ctx.read, ctx.write = read, write  # type: ignore[attr-defined]
        rows = _Rows(source, order, sizes, read)
        output = source.new_empty(sum(sizes), weight.shape[1])  # [t * k, m]
        parts = zip(_matrices(weight.mT, rows.scratch.dtype), output.split(sizes), strict=True)
        for expert, (matrix, result) in enumerate(parts):
            if len(result):
                multiply(rows.read(expert), matrix(), result)
        return output if order is None else arrange(output, order, write)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        order: ExpertOrder | None = ctx.order  # type: ignore[attr-defined]
        sizes: list[int] = ctx.sizes  # type: ignore[attr-defined]
        needs_source, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        rows = _Rows(source, order, sizes, ctx.read)  # type: ignore[attr-defined]
        gradients = _Rows(grad.contiguous(), order, sizes, ctx.write)  # type: ignore[attr-defined]
        grad_rows = source.new_empty(sum(sizes), source.shape[1] if needs_source else 0)
        into = _WeightGradient(weight, weight.shape, sizes) if needs_weight else None
        parts = zip(
            _matrices(weight, rows.scratch.dtype), grad_rows.split(sizes), sizes, strict=True
        )
        for expert, (matrix, grad_row, size) in enumerate(parts):
            if not size:
                continue
            upstream = gradients.read(expert)  # [n, m]
            if into is not None:
                into.add(expert, upstream.T, rows.read(expert))  # [m, n]
            if needs_source:
                multiply(upstream, matrix(), grad_row)
        if order is not None and needs_source:
            grad_rows = arrange(grad_rows, order, ctx.read)  # type: ignore[attr-defined]
        return (
            grad_rows if needs_source else None,
            into.result() if into is not None else None,
            None,
            None,
            None,
            None,
        )


class _WeightGradient:
    """Computes the gradient of stacked matrices [el, m, n] expert by expert.

    Args:
        weight: the parameter; its gradient is added to its buffer if it has one.
        shape: [el, m, n].
        sizes: rows of each expert; those that have none get zeros.
    """

    def __init__(self, weight: Tensor, shape: torch.Size, sizes: list[int]) -> None:
        self._weight = weight
        buffer = accumulation_buffer(weight)
        self._is_added = buffer is not None
        self._gradient = weight.new_empty(weight.shape) if buffer is None else buffer
        self._parts = self._gradient.view(shape).unbind(0)
        if buffer is None:
            for part, size in zip(self._parts, sizes, strict=True):
                if not size:
                    part.zero_()

    def add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Adds the product [m, n] of one expert; called once for each."""
        (add_product if self._is_added else multiply)(left, right, self._parts[expert])

    def result(self) -> Tensor:
        """Returns what backward returns for the weight."""
        return mark_added(self._weight) if self._is_added else self._gradient


def _matrices(stacked: Tensor, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """Lists functions that return each expert's matrix [m, n] of [el, m, n], converted."""
    return [functools.partial(matrix.to, dtype) for matrix in stacked.unbind(0)]


def _sizes(tokens_per_expert: Tensor, number: int) -> list[int]:
    """Copies the numbers of rows of each expert to the host.

    Raises:
        ValueError: there are more or fewer rows than the counts say.
    """
    sizes: list[int] = tokens_per_expert.tolist()
    if sum(sizes) != number:
        raise ValueError(f"tokens_per_expert sums to {sum(sizes)}, but there are {number} tokens")
    return sizes


def _multiply_kept(rows: _Rows, expert: int, matrix: Tensor, kept: Tensor) -> Tensor:
    """Multiplies the rows of an expert in their own precision; keeps them rounded.

    Args:
        rows: whose scratch the product may be in.
        expert: the number.
        matrix: [h, 2f].
        kept: [n, 2f] of any dtype, to be written.

    Returns:
        [n, 2f] of a working dtype, filled up.
    """
    left = rows.read(expert)
    if kept.dtype == left.dtype and len(kept) == len(left):
        multiply(left, matrix, kept)
        return kept
    exact = rows.scratch.take("projected", len(left), matrix.shape[1])
    torch.mm(left, matrix, out=exact)
    kept.copy_(exact[: len(kept)])
    return exact


def _lengthen(probs: Tensor, number: int) -> Tensor:
    """Appends zeros [n] up to a number."""
    return probs if len(probs) == number else F.pad(probs, (0, number - len(probs)))
