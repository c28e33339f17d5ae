"""Defines the kernel that sums a token's rows; QuACK's products cannot write to a row's slot."""

from __future__ import annotations

from moe_ext.kernels.triton_jit import jit, tl


@jit
def add_rows_kernel(
    rows_ptr: tl.tensor,
    places_ptr: tl.tensor,
    output_ptr: tl.tensor,
    width: tl.tensor,
    TOPK: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Writes the sum of each token's TOPK rows, which are at places, the first slot first."""
    num_columns = tl.cdiv(width, BLOCK_N)
    token = (tl.program_id(0) // num_columns).to(tl.int64)
    columns = tl.program_id(0) % num_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    is_real = columns < width
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(TOPK):
        place = tl.load(places_ptr + token * TOPK + slot).to(tl.int64)
        row = tl.load(rows_ptr + place * width + columns, mask=is_real, other=0.0)
        total += row.to(tl.float32)
    tl.store(output_ptr + token * width + columns, total.to(output_ptr.dtype.element_ty), is_real)
