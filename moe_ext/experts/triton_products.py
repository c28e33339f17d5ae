"""Launches grouped products over rows sorted by expert: shapes, memory, grids.

Nothing here reads a number from the device. Grids are bounds that hold for any counts; see
moe_ext/experts/triton_kernels.py for what a program does with its number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ext.experts import triton_kernels, triton_tiles
from moe_ext.experts.slots import Mode
from moe_ext.experts.triton_tiles import Tile


@dataclass(frozen=True, kw_only=True)
class SortedRows:
    """Describes t * k rows that are sorted by expert."""

    counts: Tensor
    """[el] integers on the operands' device: the rows of each expert."""
    number: int
    """t * k."""
    index: Tensor | None
    """[t * k] int64: the row at each place; None if operands have no other order than this."""
    topk: int = 1
    """Rows per token (k)."""

    @property
    def num_experts(self) -> int:
        """Returns the number of experts (el)."""
        return self.counts.shape[0]

    @property
    def per_expert(self) -> int:
        """Returns the mean number of rows per expert, rounded down."""
        return self.number // self.num_experts

    def mode(self, wanted: Mode) -> Mode:
        """Returns how operands are arranged: as wanted, if there is an index."""
        return "place" if self.index is None else wanted

    def max_blocks(self, block_m: int) -> int:
        """Bounds the blocks of rows for any counts: only an expert's last is not full."""
        nonempty = min(self.num_experts, self.number)
        return nonempty + (self.number - nonempty) // block_m

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of every grouped kernel about the rows."""
        return {
            "index_ptr": self.index,
            "counts_ptr": self.counts,
            "num_rows": self.number,
            "TOPK": self.topk,
            "BLOCK_E": 1 << (self.num_experts - 1).bit_length(),
        }


def grouped_product(
    source: Tensor,
    weight: Tensor,
    rows: SortedRows,
    *,
    read: Mode,
    write: Mode,
    is_transposed: bool = False,
) -> Tensor:
    """Multiplies each row by its expert's matrix: x W^T, or x W if that is transposed.

    Args:
        source: [t * k, n], or [t, n] to be read by token.
        weight: [el, m, n], or [el, n, m] if it is transposed.
        rows: of the source.
        read: the order of source.
        write: the order of the output, "place" or "row".
        is_transposed: see weight.

    Returns:
        [t * k, m] of source's dtype.
    """
    inputs = source.shape[1]
    outputs = weight.shape[2 if is_transposed else 1]
    output = source.new_empty(rows.number, outputs)
    tile = triton_tiles.product_tile(
        source.dtype, rows_per_expert=rows.per_expert, outputs=outputs, inputs=inputs
    )
    grid = rows.max_blocks(tile.block_m) * _ceil_div(outputs, tile.block_n)
    if grid:
        triton_kernels.product_kernel[(grid,)](
            source_ptr=source,
            weight_ptr=weight,
            output_ptr=output,
            num_experts=rows.num_experts,
            outputs=outputs,
            inputs=inputs,
            READ=rows.mode(read),
            WRITE=rows.mode(write),
            IS_TRANSPOSED=is_transposed,
            IS_EVEN=_is_even(tile, outputs, inputs),
            **rows.arguments(),
            **_blocks(tile),
        )
    return output


def gated_product(
    source: Tensor, weight: Tensor, gates: Tensor, rows: SortedRows, *, is_kept: bool
) -> tuple[Tensor | None, Tensor]:
    """Computes the first half of SwiGLU experts: silu(Wg x) * (Wu x) * gate.

    Args:
        source: [t, h] by token.
        weight: [el, 2, f, h] gate and up projections.
        gates: [t * k] router weights by row.
        rows: of the source.
        is_kept: whether to write what is needed for a gradient.

    Returns:
        Both projections [t * k, 2f] by place, or None; and the result [t * k, f] by place.
    """
    _, _, ffn, width = weight.shape
    projected = source.new_empty(rows.number, 2 * ffn) if is_kept else None
    product = source.new_empty(rows.number, ffn)
    tile = triton_tiles.gated_tile(
        source.dtype, rows_per_expert=rows.per_expert, ffn=ffn, width=width
    )
    grid = rows.max_blocks(tile.block_m) * _ceil_div(ffn, tile.block_n)
    if grid:
        triton_kernels.gated_kernel[(grid,)](
            source_ptr=source,
            weight_ptr=weight,
            gates_ptr=gates,
            projected_ptr=projected,
            product_ptr=product,
            num_experts=rows.num_experts,
            ffn=ffn,
            inputs=width,
            READ=rows.mode("token"),
            READ_GATES=rows.mode("row"),
            IS_EVEN=_is_even(tile, ffn, width),
            **rows.arguments(),
            **_blocks(tile),
        )
    return projected, product


def gated_product_gradient(
    upstream: Tensor,
    weight: Tensor,
    gates: Tensor,
    projected: Tensor,
    rows: SortedRows,
    *,
    is_product_needed: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the gradients of `gated_product` from that of the experts' outputs.

    Args:
        upstream: [t, h] by token, the gradient of the sum of each token's rows.
        weight: [el, h, f] down projections.
        gates: [t * k] router weights by row.
        projected: [t * k, 2f] by place, of `gated_product`.
        rows: of the product.
        is_product_needed: whether to compute the product again.

    Returns:
        Gradients of projected [t * k, 2f] by place and of gates [t * k] by row (fp32); and the
        product [t * k, f] by place, or None.
    """
    _, width, ffn = weight.shape
    grad_projected = torch.empty_like(projected)
    product = projected.new_empty(rows.number, ffn) if is_product_needed else None
    tile = triton_tiles.gated_gradient_tile(
        upstream.dtype, rows_per_expert=rows.per_expert, ffn=ffn, width=width
    )
    num_columns = _ceil_div(ffn, tile.block_n)
    # One sum for each column of tiles, added up below in an order that is always the same.
    grad_gates = gates.new_empty((rows.number, num_columns), dtype=torch.float32)
    grid = rows.max_blocks(tile.block_m) * num_columns
    if grid:
        triton_kernels.gated_gradient_kernel[(grid,)](
            upstream_ptr=upstream,
            weight_ptr=weight,
            gates_ptr=gates,
            projected_ptr=projected,
            grad_projected_ptr=grad_projected,
            product_ptr=product,
            grad_gates_ptr=grad_gates,
            num_experts=rows.num_experts,
            ffn=ffn,
            width=width,
            READ=rows.mode("token"),
            READ_GATES=rows.mode("row"),
            IS_EVEN=_is_even(tile, ffn, width),
            **rows.arguments(),
            **_blocks(tile),
        )
    return grad_projected, grad_gates.sum(dim=1), product


def grouped_weight_gradient(
    left: Tensor,
    right: Tensor,
    rows: SortedRows,
    *,
    read_left: Mode,
    read_right: Mode,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Sums left^T right over each expert's rows; zero for an expert without rows.

    Args:
        left: [t * k, m], or [t, m] to be read by token.
        right: [t * k, n], or [t, n] to be read by token.
        rows: of both.
        read_left: the order of left.
        read_right: the order of right.
        out: el * m * n elements of any floating dtype, contiguous, written in place.
        accumulate: add to what is there, in fp32, instead of writing over it.

    Raises:
        ValueError: out has another size, or is not contiguous.
    """
    outputs, inputs = left.shape[1], right.shape[1]
    if out.numel() != rows.num_experts * outputs * inputs or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} with strides {out.stride()}; a weight gradient of"
            f" {(rows.num_experts, outputs, inputs)} needs as many elements, contiguous"
        )
    if rows.number == 0:
        if not accumulate:
            out.zero_()
        return
    tile = triton_tiles.weight_gradient_tile(
        left.dtype, rows_per_expert=rows.per_expert, outputs=outputs, inputs=inputs
    )
    blocks = _ceil_div(outputs, tile.block_m) * _ceil_div(inputs, tile.block_n)
    triton_kernels.weight_gradient_kernel[(rows.num_experts * blocks,)](
        left_ptr=left,
        right_ptr=right,
        output_ptr=out,
        outputs=outputs,
        inputs=inputs,
        READ_LEFT=rows.mode(read_left),
        READ_RIGHT=rows.mode(read_right),
        IS_ADDED=accumulate,
        **rows.arguments(),
        **_blocks(tile),
    )


def add_slots(slots: Tensor, topk: int) -> Tensor:
    """Sums each token's rows, in fp32 and in the order of its slots.

    Args:
        slots: [t * k, n] by row.
        topk: rows per token (k).

    Returns:
        [t, n] of slots' dtype; slots itself if k is 1.
    """
    if topk == 1:
        return slots
    number, width = slots.shape
    output = slots.new_empty(number // topk, width)
    # 8 elements, 16 bytes, for each thread and slot: all slots of a token are read at once.
    block_n = min(1024, 1 << (width - 1).bit_length())
    grid = output.shape[0] * _ceil_div(width, block_n)
    if grid:
        triton_kernels.add_slots_kernel[(grid,)](
            slots, output, width, TOPK=topk, BLOCK_N=block_n, num_warps=4
        )
    return output


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _is_even(tile: Tile, outputs: int, inputs: int) -> bool:
    """Says whether no tile reaches over a matrix's edge, so that no load needs a mask."""
    return outputs % tile.block_n == 0 and inputs % tile.block_k == 0


def _blocks(tile: Tile) -> dict[str, Any]:
    """Translates a tile to a kernel's arguments and options."""
    options = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return options if tile.max_registers is None else {**options, "maxnreg": tile.max_registers}
