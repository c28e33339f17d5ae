"""Experts one after the other, each with its block of rows: the way of a CPU.

One pass over the experts forward, one backward, and each expert's rows stay in cache.
An expert's rows are gathered, multiplied, gated and multiplied again before the next expert's are
touched, so that everything element-wise finds its operands in cache, and the permuted tokens are
never written to memory. What is kept for backward is `projected` [rows, 2f]; tokens are gathered
and the activation is computed again, which costs less than reading either back would.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_ext.experts.gate import gated_backward, gated_forward
from moe_ext.experts.slots import ExpertOrder, sum_slots
from moe_ext.gradients import accumulation_buffer, mark_added
from moe_ext.products import add_product, multiply, working_dtype

Block = tuple[int, slice]
"""An expert and its rows, of which there is at least one."""


def blockwise_experts(
    hidden: Tensor, weight1: Tensor, weight2: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> Tensor:
    """SwiGLU experts over sorted rows; the contract is `grouped_experts`'s."""
    blocks = _blocks(tokens_per_expert, hidden.shape[0])
    output: Tensor = _Experts.apply(hidden, weight1, weight2, probs, None, blocks)
    return output


def blockwise_routed(
    tokens: Tensor, weight1: Tensor, weight2: Tensor, order: ExpertOrder, gates: Tensor
) -> Tensor:
    """Gather, experts, weighted sum; the contract is `ExpertBackend.routed`'s."""
    blocks = _blocks(order.tokens_per_expert, len(order.rows))
    output: Tensor = _Experts.apply(tokens, weight1, weight2, gates, order, blocks)
    return output


def blockwise_projection(rows: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Each expert's rows by its matrix; the contract is `grouped_projection`'s."""
    blocks = _blocks(tokens_per_expert, rows.shape[0])
    output: Tensor = _Projection.apply(rows, weight, blocks)
    return output


class _Rows:
    """Sorted rows of [t, n] tokens, read expert by expert, in the dtype products are computed in.

    Args:
        source: [t, n] tokens, or the sorted rows themselves.
        order: how rows come from tokens; None where `source` has them sorted.
    """

    def __init__(self, source: Tensor, order: ExpertOrder | None) -> None:
        self._source = source
        self._sources = None if order is None else order.tokens
        self.dtype = working_dtype(source)

    def read(self, rows: slice) -> Tensor:
        """[n, h] of these rows."""
        if self._sources is None:
            return self._source[rows].to(self.dtype)
        return self._source.index_select(0, self._sources[rows]).to(self.dtype)


class _Experts(torch.autograd.Function):
    """All experts as one autograd node."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        gates: Tensor,
        order: ExpertOrder | None,
        blocks: list[Block],
    ) -> Tensor:
        rows = _Rows(tokens, order)
        probs = _sorted_gates(gates, order)  # [rows]
        number, width = len(probs), tokens.shape[-1]
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        projected = tokens.new_empty(number, stacked.shape[1])
        output = tokens.new_empty(number, width)
        for expert, block in blocks:
            first = _multiply_kept(
                rows.read(block), stacked[expert].T.to(rows.dtype), projected[block]
            )  # [n, 2f]
            product = gated_forward(first, probs[block])  # [n, f]
            multiply(product, weight2[expert].T.to(rows.dtype), output[block])
        ctx.save_for_backward(tokens, weight1, weight2, gates, projected)
        ctx.order, ctx.blocks = order, blocks  # type: ignore[attr-defined]
        return output if order is None else sum_slots(output, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weight1, weight2, gates, projected = ctx.saved_tensors  # type: ignore[attr-defined]
        order: ExpertOrder | None = ctx.order  # type: ignore[attr-defined]
        blocks: list[Block] = ctx.blocks  # type: ignore[attr-defined]
        needs_tokens, needs_weight1, needs_weight2 = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        rows, gradients = _Rows(tokens, order), _Rows(grad.contiguous(), order)
        probs = _sorted_gates(gates, order)  # [rows]
        grad_probs = torch.zeros_like(probs)
        grad_rows = tokens.new_empty(len(probs), tokens.shape[1]) if needs_tokens else None
        stacked = weight1.flatten(1, 2)  # [el, 2f, h]
        into1 = _WeightGradient(weight1, stacked.shape, blocks) if needs_weight1 else None
        into2 = _WeightGradient(weight2, weight2.shape, blocks) if needs_weight2 else None
        for expert, block in blocks:
            upstream = gradients.read(block)  # [n, h]
            grad_product = upstream @ weight2[expert].to(rows.dtype)  # [n, f]
            grad_projected, grad_probs[block], product = gated_backward(
                grad_product, projected[block].to(rows.dtype), probs[block]
            )
            if into2 is not None:
                into2.add(expert, upstream.T, product)  # [h, f]
            if into1 is not None:
                into1.add(expert, grad_projected.T, rows.read(block))  # [2f, h]
            if grad_rows is not None:
                multiply(grad_projected, stacked[expert].to(rows.dtype), grad_rows[block])
        if grad_rows is not None and order is not None:
            grad_rows = sum_slots(grad_rows, order)  # [t, h]
        return (
            grad_rows,
            into1.result() if into1 is not None else None,
            into2.result() if into2 is not None else None,
            _unsorted_gates(grad_probs, gates, order),
            None,
            None,
        )


class _Projection(torch.autograd.Function):
    """One matrix per expert as one autograd node."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor, blocks: list[Block]
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.blocks = blocks  # type: ignore[attr-defined]
        source = _Rows(rows, None)
        output = rows.new_empty(rows.shape[0], weight.shape[1])  # [t, m]
        for expert, block in blocks:
            multiply(source.read(block), weight[expert].T.to(source.dtype), output[block])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        blocks: list[Block] = ctx.blocks  # type: ignore[attr-defined]
        needs_rows, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        source, gradients = _Rows(rows, None), _Rows(grad.contiguous(), None)
        grad_rows = torch.empty_like(rows) if needs_rows else None  # [t, n]
        into = _WeightGradient(weight, weight.shape, blocks) if needs_weight else None
        for expert, block in blocks:
            upstream = gradients.read(block)  # [n, m]
            if into is not None:
                into.add(expert, upstream.T, source.read(block))  # [m, n]
            if grad_rows is not None:
                multiply(upstream, weight[expert].to(source.dtype), grad_rows[block])
        return grad_rows, into.result() if into is not None else None, None


class _WeightGradient:
    """The gradient of stacked matrices [el, m, n], made expert by expert.

    Args:
        weight: the parameter; its gradient is added to its buffer if it has one.
        shape: [el, m, n].
        blocks: experts that will be added; the others' gradients are zero.
    """

    def __init__(self, weight: Tensor, shape: torch.Size, blocks: list[Block]) -> None:
        self._weight = weight
        buffer = accumulation_buffer(weight)
        self._is_added = buffer is not None
        self._gradient = (weight.new_empty(shape) if buffer is None else buffer).view(shape)
        if buffer is None:
            for expert in {*range(shape[0])} - {expert for expert, _ in blocks}:
                self._gradient[expert].zero_()

    def add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """The product [m, n] of one expert, once for each."""
        (add_product if self._is_added else multiply)(left, right, self._gradient[expert])

    def result(self) -> Tensor:
        """What backward returns for the weight."""
        return mark_added(self._weight) if self._is_added else self._gradient.view_as(self._weight)


def _blocks(tokens_per_expert: Tensor, number: int) -> list[Block]:
    """Which rows are whose, for the experts that have any.

    Raises:
        ValueError: there are more or fewer rows than the counts say.
    """
    sizes = tokens_per_expert.tolist()
    if sum(sizes) != number:
        raise ValueError(f"tokens_per_expert sums to {sum(sizes)}, but there are {number} tokens")
    return list(_nonempty(sizes))


def _nonempty(sizes: list[int]) -> Iterator[Block]:
    for expert, (start, end) in enumerate(
        itertools.pairwise(itertools.accumulate(sizes, initial=0))
    ):
        if end > start:
            yield expert, slice(start, end)


def _multiply_kept(left: Tensor, right: Tensor, kept: Tensor) -> Tensor:
    """The product, in its own precision, and rounded into `kept`."""
    if kept.dtype == left.dtype:
        multiply(left, right, kept)
        return kept
    exact = left @ right
    kept.copy_(exact)
    return exact


def _sorted_gates(gates: Tensor, order: ExpertOrder | None) -> Tensor:
    """[t, k] to [t * k] sorted by expert; [t] as it is where the rows are sorted."""
    return gates if order is None else gates.flatten().index_select(0, order.rows)


def _unsorted_gates(rows: Tensor, like: Tensor, order: ExpertOrder | None) -> Tensor:
    """The inverse of `_sorted_gates`."""
    return rows if order is None else rows.index_select(0, order.places).view_as(like)
