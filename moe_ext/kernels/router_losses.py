"""Computes a router's losses from sums over its tokens, and the gradient of its logits.

Two kernels: one program that sums over the parts of `router_choice` and makes the losses, and the
backward pass, which reads scores and writes the logits' gradient once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_ext.kernels.router_choice import options
from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ext.kernels.router_choice import RouterRule, Selection, Sums

NUM_SCALARS = 5
"""Columns of a record ahead of the counts; `moe_ext.metrics` says which."""


@jit
def router_losses_kernel(
    score_parts_ptr: tl.tensor,
    count_parts_ptr: tl.tensor,
    loss_parts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    share_counts_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    addend_ptr: tl.tensor,
    record_ptr: tl.tensor,
    balance_coeff: tl.tensor,
    z_coeff: tl.tensor,
    batch_share: tl.tensor,
    num_rows: tl.tensor,
    NUMBER: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Sums num_rows parts; writes the losses' sum, its derivatives by these sums, and a record."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < NUMBER
    score_tiles = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    count_tiles = tl.zeros((BLOCK_ROWS, BLOCK), tl.int32)
    z_sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    entropies = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        is_row = rows < num_rows
        is_real = is_row[:, None] & is_column[None, :]
        lines = rows[:, None] * NUMBER + columns[None, :]
        score_tiles += tl.load(score_parts_ptr + lines, mask=is_real, other=0.0)
        count_tiles += tl.load(count_parts_ptr + lines, mask=is_real, other=0)
        z_sums += tl.load(loss_parts_ptr + 2 * rows, mask=is_row, other=0.0)
        entropies += tl.load(loss_parts_ptr + 2 * rows + 1, mask=is_row, other=0.0)
    score_sums = tl.sum(score_tiles, axis=0)
    own_counts = tl.sum(count_tiles, axis=0).to(tl.int64)
    z_sum = tl.sum(z_sums, axis=0)
    counts = own_counts
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + columns, mask=is_column, other=0)
    of_shares = counts
    if share_counts_ptr is not None:
        of_shares = tl.load(share_counts_ptr + columns, mask=is_column, other=0)
    # Each token has TOPK experts; a micro-batch of padding alone has losses of 0.
    num_tokens = tl.maximum(tl.sum(counts, axis=0) // TOPK, 1).to(tl.float32)
    whole = tl.maximum(tl.sum(of_shares, axis=0), 1).to(tl.float32)
    slopes = NUMBER * (of_shares.to(tl.float32) / whole) / num_tokens
    balance = tl.sum(slopes * score_sums, axis=0)
    tl.store(addend_ptr, balance_coeff * balance + z_coeff * (z_sum / num_tokens))
    tl.store(slopes_ptr + columns, balance_coeff * slopes, mask=is_column)
    tl.store(slopes_ptr + NUMBER, z_coeff / num_tokens)
    own_tokens = tl.sum(own_counts, axis=0) // TOPK
    tl.store(record_ptr, balance)
    tl.store(record_ptr + 1, batch_share)
    tl.store(record_ptr + 2, z_sum)
    tl.store(record_ptr + 3, tl.sum(entropies, axis=0))
    tl.store(record_ptr + 4, own_tokens)
    tl.store(record_ptr + 5 + columns, own_counts, mask=is_column)


@jit
def router_gradient_kernel(
    grad_gates_ptr: tl.tensor,
    grad_scores_ptr: tl.tensor,
    grad_addend_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    normalizers_ptr: tl.tensor,
    is_token_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    num_rows: tl.tensor,
    NUMBER: tl.constexpr,
    TOPK: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes the gradient of the logits from those of gates, scores and the losses' sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < num_rows, columns < NUMBER
    is_real = is_row[:, None] & is_column[None, :]
    offsets = rows[:, None] * NUMBER + columns[None, :]
    scores = tl.load(scores_ptr + offsets, mask=is_real, other=0.0)
    of_scores = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    direct = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    if grad_scores_ptr is not None:
        of_scores += tl.load(grad_scores_ptr + offsets, mask=is_real, other=0.0)
    if grad_gates_ptr is not None:
        of_gates = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
        gates = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
        for slot in range(TOPK):
            slots = rows * TOPK + slot
            expert = tl.load(experts_ptr + slots, mask=is_row, other=-1)
            grad = tl.load(grad_gates_ptr + slots, mask=is_row, other=0.0)
            is_expert = columns[None, :] == expert[:, None]
            of_gates = tl.where(is_expert, grad[:, None], of_gates)
            if IS_NORMALIZED:
                gate = tl.load(gates_ptr + slots, mask=is_row, other=0.0)
                gates = tl.where(is_expert, gate[:, None], gates)
        if IS_NORMALIZED:
            direct += gates * (of_gates - tl.sum(gates * of_gates, axis=1)[:, None])
        else:
            of_scores += of_gates
    if slopes_ptr is not None:
        upstream = tl.load(grad_addend_ptr)
        is_counted = is_row
        if is_token_ptr is not None:
            is_counted &= tl.load(is_token_ptr + rows, mask=is_row, other=0) != 0
        slopes = tl.load(slopes_ptr + columns, mask=is_column, other=0.0) * upstream
        of_scores += tl.where(is_counted[:, None], slopes[None, :], 0.0)
        normalizer = tl.load(normalizers_ptr + rows, mask=is_counted, other=0.0)
        z_slope = 2.0 * upstream * tl.load(slopes_ptr + NUMBER)
        direct += scores * (z_slope * normalizer)[:, None]
    projection = tl.sum(scores * of_scores, axis=1)
    gradient = scores * (of_scores - projection[:, None]) + direct
    gradient = gradient.to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + offsets, gradient, mask=is_real)


class Losses(NamedTuple):
    """Holds what `router_losses` finds, without gradients."""

    addend: Tensor
    """[] fp32: both losses of this rank's tokens, times their coefficients."""
    slopes: Tensor
    """[e + 1] fp32: its derivatives by the sums of the scores and of logsumexp^2."""
    record: Tensor
    """[5 + e] fp64 for `RouterMetrics.add`."""


def router_losses(
    sums: Sums,
    topk: int,
    *,
    balance_coeff: float,
    z_coeff: float,
    batch_share: float,
    counts: Tensor | None = None,
    share_counts: Tensor | None = None,
) -> Losses:
    """Makes the load-balancing loss, the z-loss and the record of a micro-batch.

    Args:
        sums: of this rank's tokens.
        topk: k.
        balance_coeff: multiplies the load-balancing loss.
        z_coeff: multiplies the z-loss.
        batch_share: what of the micro-batch's record is this rank's.
        counts: [e] int64 assignments over the ranks that share the micro-batch; None where this
            rank has all of it.
        share_counts: [e] int64 assignments whose shares are f_i; None means `counts`.
    """
    parts, number = sums.scores.shape
    addend = sums.scores.new_empty(())
    slopes = sums.scores.new_empty(number + 1)
    record = sums.scores.new_empty(NUM_SCALARS + number, dtype=torch.float64)
    router_losses_kernel[(1,)](
        *sums,
        counts,
        share_counts,
        slopes,
        addend,
        record,
        balance_coeff=balance_coeff,
        z_coeff=z_coeff,
        batch_share=batch_share,
        num_rows=parts,
        TOPK=topk,
        **options(number),
    )
    return Losses(addend, slopes, record)


class _Differentiable(torch.autograd.Function):
    """Returns gates, scores and the losses' sum as they are, as functions of the logits."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        selection: Selection,
        losses: Losses | None,
        rule: RouterRule,
        is_token: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        experts, gates, scores, normalizers, _ = selection
        slopes = None if losses is None else losses.slopes
        kept = (experts, gates, scores, normalizers, is_token, slopes)
        ctx.save_for_backward(*kept)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.dtype = rule, logits.dtype  # type: ignore[attr-defined]
        addend = None if losses is None else losses.addend.detach()
        return gates.detach(), scores.detach(), addend

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_gates: Tensor | None,
        grad_scores: Tensor | None,
        grad_addend: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        experts, gates, scores, normalizers, is_token, slopes = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_logits = torch.empty_like(scores, dtype=ctx.dtype)  # type: ignore[attr-defined]
        constants = options(scores.shape[1])
        if len(scores):
            router_gradient_kernel[(-(-len(scores) // constants["BLOCK_ROWS"]),)](
                *(
                    None if each is None else each.contiguous()
                    for each in (grad_gates, grad_scores)
                ),
                grad_addend,
                experts,
                gates,
                scores,
                normalizers,
                is_token,
                None if grad_addend is None else slopes,
                grad_logits,
                num_rows=len(scores),
                TOPK=experts.shape[1],
                IS_NORMALIZED=ctx.rule == "topk_softmax",  # type: ignore[attr-defined]
                **constants,
            )
        return grad_logits, None, None, None, None


def differentiable(
    logits: Tensor,
    selection: Selection,
    losses: Losses | None,
    rule: RouterRule,
    is_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives gates, scores and the losses' sum their gradients; nothing is computed again.

    Differentiable once.

    Args:
        logits: [t, e] as given to `select`.
        selection: what it found.
        losses: what `router_losses` made of it; None for none.
        rule: as given to `select`.
        is_token: as given to `select`.

    Returns:
        Gates [t, k], scores [t, e], and the losses' sum [] or None.
    """
    found: tuple[Tensor, Tensor, Tensor | None] = _Differentiable.apply(
        logits, selection, losses, rule, is_token
    )
    return found
