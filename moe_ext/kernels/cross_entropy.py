"""Computes a softmax's statistics and the gradient of its cross-entropy over one row's logits.

A program has a row. It reads the logits once for their maximum and the sum of their exponentials,
and once more, out of L2, for the gradient, which it writes over them: 2 reads and 1 write of a
logit's 2 bytes in bf16, of which memory sees one read and the write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@jit
def statistics_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    target_ptr: tl.tensor,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes a row's largest logit, its sum of exp(logit - largest), and its label's logit.

    With weights, writes the gradient over the logits, too. A label that is none of the row's has a
    logit of 0.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUMBER
    label = tl.load(labels_ptr + row)
    # Read before the reductions below, whose barriers are before all writes of this program.
    target = tl.load(logits_ptr + label, mask=(label >= 0) & (label < NUMBER), other=0.0)
    columns = tl.arange(0, BLOCK)
    # The lowest finite number: the difference of two infinities would be none.
    largest = tl.full((), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, NUMBER, BLOCK):
        is_real = start + columns < NUMBER
        logits = tl.load(logits_ptr + start + columns, mask=is_real, other=float("-inf"))
        logits = logits.to(tl.float32)
        above = tl.maximum(largest, tl.max(logits, 0))
        sums = sums * tl.exp(largest - above) + tl.exp(logits - above)
        largest = above
    total = tl.sum(sums, 0)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    tl.store(target_ptr + row, target.to(tl.float32))
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
        write_gradient(logits_ptr, label, largest, total, weight, NUMBER, BLOCK)


@jit
def gradient_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gradient over a row's logits, from statistics of more logits than these."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    largest = tl.load(largest_ptr + row)
    total = tl.load(total_ptr + row)
    weight = tl.load(weights_ptr + row)
    write_gradient(logits_ptr + row * NUMBER, label, largest, total, weight, NUMBER, BLOCK)


@jit
def write_gradient(
    logits_ptr: tl.tensor,
    label: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes weight (probability - [is label]) over the logits."""
    columns = tl.arange(0, BLOCK)
    scale = weight / total
    for start in range(0, NUMBER, BLOCK):
        is_real = start + columns < NUMBER
        logits = tl.load(logits_ptr + start + columns, mask=is_real, other=0.0).to(tl.float32)
        of_label = tl.where(start + columns == label, weight, 0.0)
        gradient = tl.exp(logits - largest) * scale - of_label
        gradient = gradient.to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + start + columns, gradient, mask=is_real)


def softmax_statistics(
    logits: Tensor, labels: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each row's largest logit, its sum of exp(logit - largest) and its label's logit.

    Args:
        logits: [c, v] contiguous, v at least 1; overwritten by the gradient of the weighted sum of
            the cross-entropies, if there are weights.
        labels: [c] int64 columns; outside 0 .. v - 1, a row's label is none of its logits.
        token_weights: [c] fp32; None leaves the logits as they are.

    Returns:
        [c] fp32 each; the label's logit is 0 where it has none.
    """
    _check(logits, labels, token_weights)
    rows, number = logits.shape
    largest, total, target = logits.new_empty(3, rows, dtype=torch.float32)
    if rows:
        statistics_kernel[(rows,)](
            logits, labels, token_weights, largest, total, target, **options(number)
        )
    return largest, total, target


def softmax_gradient_(
    logits: Tensor, labels: Tensor, token_weights: Tensor, largest: Tensor, total: Tensor
) -> None:
    """Writes the gradient over logits whose softmax is over more than them.

    Args:
        logits: [c, v] contiguous.
        labels: [c] int64 columns, as `softmax_statistics` has them.
        token_weights: [c] fp32.
        largest: [c] fp32, of all logits of a row.
        total: [c] fp32, sum of exp(logit - largest) over all logits of a row.
    """
    _check(logits, labels, token_weights, largest, total)
    rows, number = logits.shape
    if rows:
        gradient_kernel[(rows,)](logits, labels, token_weights, largest, total, **options(number))


def _check(logits: Tensor, *rows: Tensor | None) -> None:
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits are {tuple(logits.shape)}, {logits.stride()}; give [c, v], dense")
    for each in rows:
        if each is not None and (each.shape != logits.shape[:1] or not each.is_contiguous()):
            raise ValueError(
                f"{tuple(each.shape)} for {logits.shape[0]} rows; give one number each"
            )


def options(number: int) -> dict[str, int]:
    """Returns a kernel's constants; the number is one, so that loads are as wide as it allows."""
    block = min(_BLOCK, 1 << (number - 1).bit_length())
    return {"NUMBER": number, "BLOCK": block, "num_warps": max(1, min(_WARPS, block // 256))}
