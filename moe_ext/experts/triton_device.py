"""Defines the parts of expert kernels: find a program's tile and its rows, and multiply them.

A *place* is a position in the order sorted by expert, a *row* is slot `row % TOPK` of token
`row // TOPK`; `index[place]` is the row. An operand has its rows by place ("place"), by row ("row")
or by token ("token"), and is read and written there through the index, so that nothing is ever
permuted in memory.

Each program makes one tile of one expert. It finds out which from the counts, on the device: the
grid is only a bound, and programs beyond the last tile return. Tiles of one expert are neighbours,
and inside an expert GROUP_M blocks of rows go down the columns together, so that the tiles under
way at one time share weights and rows in L2.
"""

from __future__ import annotations

from moe_ext.kernels.triton_jit import INTERPRETED, jit, tl


@jit
def locate(
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    num_columns: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tl.tensor:
    """Finds a program's expert (num_experts or more: none), first place, end and column."""
    tile = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0).to(tl.int32)
    tiles = tl.cdiv(counts, BLOCK_M) * num_columns
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    is_before = experts < expert
    first = tl.sum(tl.where(is_before, counts, 0), 0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    tile = tile - tl.sum(tl.where(is_before, tiles, 0), 0)
    block, column = traverse(tile, tl.cdiv(count, BLOCK_M), num_columns, GROUP_M)
    # Counts that sum to more than there are rows must not lead outside the tensors.
    end = tl.minimum(first + count, num_rows)
    return expert, first + block * BLOCK_M, end, column


@jit
def traverse(
    tile: tl.tensor, num_blocks: tl.tensor, num_columns: tl.tensor, GROUP_M: tl.constexpr
) -> tl.tensor:
    """Finds block and column of a tile: GROUP_M blocks go down each column in turn."""
    group_tiles = GROUP_M * num_columns
    first = tile // group_tiles * GROUP_M
    height = tl.maximum(tl.minimum(num_blocks - first, GROUP_M), 1)
    within = tile % group_tiles
    return first + within % height, within // height


@jit
def lines_at(
    places: tl.tensor, index_ptr: tl.tensor, TOPK: tl.constexpr, MODE: tl.constexpr
) -> tl.tensor:
    """Finds where an operand has the rows of these places; all places must exist."""
    if MODE == "place":
        lines = places
    elif MODE == "row":
        lines = tl.load(index_ptr + places)
    else:
        lines = tl.load(index_ptr + places) // TOPK
    return lines.to(tl.int64)


@jit
def add_dot(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Computes total + left right in fp32; operands of fp32 are not rounded to tf32."""
    if INTERPRETED:
        # The interpreter keeps bf16 as integers of 16 bits, and multiplies those.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@jit
def multiply(
    source_ptr: tl.tensor,
    lines: tl.tensor,
    weight_ptr: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> tl.tensor:
    """Multiplies lines [?, inputs] by columns of an expert's [outputs, inputs] or its transpose."""
    depth = tl.arange(0, BLOCK_K)
    left_ptrs = source_ptr + lines[:, None] * inputs + depth[None, :]
    if IS_TRANSPOSED:
        right_ptrs = weight_ptr + depth.to(tl.int64)[:, None] * outputs + columns[None, :]
        stride = outputs
    else:
        right_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * inputs + depth[:, None]
        stride = 1
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if IS_EVEN:
            left = tl.load(left_ptrs)
            right = tl.load(right_ptrs)
        else:
            is_inside = depth < inputs - start
            left = tl.load(left_ptrs, mask=is_inside[None, :], other=0.0)
            is_real = is_inside[:, None] & (columns < outputs)[None, :]
            right = tl.load(right_ptrs, mask=is_real, other=0.0)
        total = add_dot(left, right, total)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K * stride
    return total


@jit
def halves(tile: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Splits a tile into left and right columns; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
