"""Sorts assignments by expert by counting them, in two kernels of Triton.

The first counts each part's assignments of each expert. In the second a part begins, for each
expert, where the parts before it end, and puts its own in their order. All of it is in integers:
the order is that of a stable sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_ext.kernels.router_choice import MOST_EXPERTS
from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 4096
"""Numbers of a program's table of assignments and experts."""
PARTS = 256
"""Programs at most."""


@jit
def expert_counts_kernel(
    experts_ptr: tl.tensor,
    count_parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_part: tl.tensor,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes how many of a part's assignments each expert has."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK_ROWS, BLOCK), tl.int32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        expert = tl.load(experts_ptr + rows, mask=rows < last, other=-1)
        counts += (expert[:, None] == columns[None, :]).to(tl.int32)
    tl.store(
        count_parts_ptr + part * NUMBER + columns, tl.sum(counts, axis=0), mask=columns < NUMBER
    )


@jit
def expert_order_kernel(
    experts_ptr: tl.tensor,
    count_parts_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    places_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_parts: tl.tensor,
    rows_per_part: tl.tensor,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes the place of each of a part's assignments, and each to its place; and all counts."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < NUMBER
    before = tl.zeros((BLOCK_ROWS, BLOCK), tl.int32)
    whole = tl.zeros((BLOCK_ROWS, BLOCK), tl.int32)
    for start in range(0, num_parts, BLOCK_ROWS):
        parts = start + tl.arange(0, BLOCK_ROWS)
        is_real = (parts < num_parts)[:, None] & is_column[None, :]
        lines = parts[:, None] * NUMBER + columns[None, :]
        counts = tl.load(count_parts_ptr + lines, mask=is_real, other=0)
        whole += counts
        before += tl.where((parts < part)[:, None], counts, 0)
    total = tl.sum(whole, axis=0)
    if part == 0:
        tl.store(counts_ptr + columns, total.to(tl.int64), mask=is_column)
    # Where each expert's next assignment goes.
    begin = tl.cumsum(total, axis=0) - total + tl.sum(before, axis=0)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        is_row = rows < last
        expert = tl.load(experts_ptr + rows, mask=is_row, other=-1)
        is_expert = (expert[:, None] == columns[None, :]).to(tl.int32)
        earlier = tl.cumsum(is_expert, axis=0) - is_expert
        place = tl.sum(is_expert * (earlier + begin[None, :]), axis=1).to(tl.int64)
        tl.store(places_ptr + rows, place, mask=is_row)
        tl.store(rows_ptr + place, rows.to(tl.int64), mask=is_row)
        begin += tl.sum(is_expert, axis=0)


def count_and_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts assignments by expert; those of one expert stay in their order.

    Args:
        experts: [n] int64, from 0 to num_experts - 1, n below 2^31.
        num_experts: e, at most `MOST_EXPERTS`.

    Returns:
        The assignment at each place [n] int64, the place of each [n] int64, and each expert's
        number of them [e] int64.

    Raises:
        ValueError: there are too many experts, or experts are no list of int64.
    """
    if num_experts > MOST_EXPERTS or experts.dim() != 1 or experts.dtype != torch.int64:
        raise ValueError(
            f"experts are {tuple(experts.shape)} of {experts.dtype}, {num_experts} in all; give [n]"
            f" of torch.int64, of at most {MOST_EXPERTS} experts"
        )
    experts = experts.contiguous()
    number = len(experts)
    rows, places = torch.empty_like(experts), torch.empty_like(experts)
    if not number:
        return rows, places, experts.new_zeros(num_experts)
    constants = options(num_experts)
    block = constants["BLOCK_ROWS"]
    per_part = -(-number // (PARTS * block)) * block  # whole blocks
    num_parts = -(-number // per_part)
    parts = experts.new_empty(num_parts, num_experts, dtype=torch.int32)
    counts = experts.new_empty(num_experts)
    sizes = {"num_rows": number, "rows_per_part": per_part}
    expert_counts_kernel[(num_parts,)](experts, parts, **sizes, **constants)
    expert_order_kernel[(num_parts,)](
        experts, parts, rows, places, counts, num_parts=num_parts, **sizes, **constants
    )
    return rows, places, counts


def options(num_experts: int) -> dict[str, Any]:
    """Returns the kernels' constants for so many experts."""
    block = 1 << (num_experts - 1).bit_length()
    return {
        "NUMBER": num_experts,
        "BLOCK": block,
        "BLOCK_ROWS": max(1, _TILE // block),
        "num_warps": 8,
    }
