"""Computes a router's selection, and the sums that its losses are of, in one pass.

A program has a part of the tokens, a block at a time: softmax over the experts, top-k, gates in the
order of the experts, and the part's sums. Sums have one order, so that two runs give the same bits.
Experts whose keys are equal are taken in the order of their numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

RouterRule = Literal["softmax_topk", "topk_softmax"]
"""The rules of `moe_ext.functional` of the same names."""

MOST_EXPERTS = 1024
"""Of a row that fits into a program's registers."""
_TILE = 1024
"""Numbers a program holds at least, where there are as many."""
PARTS = 512
"""Programs of the first kernel at most, each with its own sums. A constant, so that sums have the
same order everywhere."""


@jit
def router_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    is_token_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    normalizers_ptr: tl.tensor,
    score_parts_ptr: tl.tensor,
    count_parts_ptr: tl.tensor,
    loss_parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_part: tl.tensor,
    NUMBER: tl.constexpr,
    TOPK: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes experts, gates, scores and logsumexp of rows, and sums over a part of them."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < NUMBER
    score_sums = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    counts = tl.zeros((BLOCK_ROWS, BLOCK), tl.int32)
    z_sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    entropies = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = tl.program_id(0) * rows_per_part
    last = tl.minimum(first + rows_per_part, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        is_row = rows < last
        is_real = is_row[:, None] & is_column[None, :]
        offsets = rows[:, None] * NUMBER + columns[None, :]
        logits = tl.load(logits_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
        logits = tl.where(is_column[None, :], logits, float("-inf"))
        largest = tl.max(logits, axis=1)
        powers = tl.exp(logits - largest[:, None])
        total = tl.sum(powers, axis=1)
        scores = powers / total[:, None]
        keys = logits if IS_NORMALIZED else scores
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0)
            keys = scores + bias[None, :]
        is_chosen = choose(keys, is_column, TOPK, BLOCK, BLOCK_ROWS)
        gates = scores
        if IS_NORMALIZED:
            most = tl.max(tl.where(is_chosen, logits, float("-inf")), axis=1)
            of_chosen = tl.where(is_chosen, tl.exp(logits - most[:, None]), 0.0)
            gates = of_chosen / tl.sum(of_chosen, axis=1)[:, None]
        slots = rows[:, None] * TOPK + tl.cumsum(is_chosen.to(tl.int32), axis=1) - 1
        numbers = tl.broadcast_to(columns[None, :], (BLOCK_ROWS, BLOCK)).to(tl.int64)
        tl.store(experts_ptr + slots, numbers, mask=is_chosen & is_row[:, None])
        tl.store(gates_ptr + slots, gates, mask=is_chosen & is_row[:, None])
        tl.store(scores_ptr + offsets, scores, mask=is_real)
        if score_parts_ptr is not None:
            normalizer = largest + tl.log(total)
            tl.store(normalizers_ptr + rows, normalizer, mask=is_row)
            is_counted = is_row
            if is_token_ptr is not None:
                is_counted &= tl.load(is_token_ptr + rows, mask=is_row, other=0) != 0
            score_sums += tl.where(is_counted[:, None], scores, 0.0)
            counts += (is_chosen & is_counted[:, None]).to(tl.int32)
            z_sums += tl.where(is_counted, normalizer * normalizer, 0.0)
            surprise = tl.where(scores == 0.0, 0.0, normalizer[:, None] - logits)
            entropies += tl.where(is_counted, tl.sum(scores * surprise, axis=1), 0.0)
    if score_parts_ptr is not None:
        line = part * NUMBER + columns
        tl.store(score_parts_ptr + line, tl.sum(score_sums, axis=0), mask=is_column)
        tl.store(count_parts_ptr + line, tl.sum(counts, axis=0), mask=is_column)
        tl.store(loss_parts_ptr + 2 * part, tl.sum(z_sums, axis=0))
        tl.store(loss_parts_ptr + 2 * part + 1, tl.sum(entropies, axis=0))


@jit
def choose(
    keys: tl.tensor,
    is_column: tl.tensor,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tl.tensor:
    """Marks the TOPK largest keys of each row, of equal ones the first; what is no number leads."""
    columns = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (BLOCK_ROWS, BLOCK))
    keys = tl.where(keys != keys, float("inf"), keys)
    is_real = tl.broadcast_to(is_column[None, :], (BLOCK_ROWS, BLOCK))
    is_left = is_real
    for _ in range(TOPK):
        best = tl.max(tl.where(is_left, keys, float("-inf")), axis=1)
        is_best = is_left & (keys == best[:, None])
        chosen = tl.min(tl.where(is_best, columns, BLOCK), axis=1)
        is_left = is_left & (columns != chosen[:, None])
    return is_real & (is_left == 0)


class Sums(NamedTuple):
    """Holds sums over n parts of the tokens, padding left out, for `router_losses`."""

    scores: Tensor
    """[n, e] fp32."""
    counts: Tensor
    """[n, e] int32 assignments."""
    losses: Tensor
    """[n, 2] fp32: of logsumexp(logits)^2, and of the routing entropy."""


class Selection(NamedTuple):
    """Holds what `select` finds, without gradients."""

    experts: Tensor
    """[t, k] int64, ascending in each row."""
    gates: Tensor
    """[t, k] fp32."""
    scores: Tensor
    """[t, e] fp32."""
    normalizers: Tensor | None
    """[t] fp32 logsumexp of the logits, beside sums."""
    sums: Sums | None


def select(
    logits: Tensor,
    rule: RouterRule,
    topk: int,
    *,
    bias: Tensor | None = None,
    is_token: Tensor | None = None,
    with_sums: bool = False,
) -> Selection:
    """Applies a routing rule.

    Args:
        logits: [t, e] bf16 or fp32.
        rule: which.
        topk: k, 1 to e.
        bias: [e] fp32 added to the scores for the selection alone; None for none.
        is_token: [t] bool, False for padding, which is in no sum; None for none.
        with_sums: whether sums are made.

    Raises:
        ValueError: shapes do not fit.
    """
    logits = logits.contiguous()
    rows, number = logits.shape
    if number > MOST_EXPERTS or not 1 <= topk <= number:
        raise ValueError(
            f"{topk} of {number} experts; give 1 to all of them, of at most {MOST_EXPERTS}"
        )
    for name, each, size in (("bias", bias, number), ("is_token", is_token, rows)):
        if each is not None and each.shape != (size,):
            raise ValueError(f"{name} is {tuple(each.shape)} for logits [{rows}, {number}]")
    constants = options(number)
    block = constants["BLOCK_ROWS"]
    per_part = max(1, -(-rows // (PARTS * block))) * block  # whole blocks
    parts = -(-rows // per_part)
    experts = torch.empty(rows, topk, dtype=torch.int64, device=logits.device)
    gates = torch.empty(rows, topk, dtype=torch.float32, device=logits.device)
    scores = gates.new_empty(rows, number)
    normalizers = sums = None
    if with_sums:
        normalizers = scores.new_empty(rows)
        counts = torch.empty(parts, number, dtype=torch.int32, device=logits.device)
        sums = Sums(scores.new_empty(parts, number), counts, scores.new_empty(parts, 2))
    if rows:
        router_kernel[(parts,)](
            logits,
            bias,
            is_token,
            experts,
            gates,
            scores,
            normalizers,
            *(sums or (None, None, None)),
            num_rows=rows,
            rows_per_part=per_part,
            TOPK=topk,
            IS_NORMALIZED=rule == "topk_softmax",
            **constants,
        )
    return Selection(experts, gates, scores, normalizers, sums)


def options(number: int) -> dict[str, Any]:
    """Returns the kernels' constants for so many experts."""
    block = 1 << (number - 1).bit_length()
    rows = max(1, _TILE // block)
    return {
        "NUMBER": number,
        "BLOCK": block,
        "BLOCK_ROWS": rows,
        "num_warps": min(8, max(1, rows * block // 128)),
    }
