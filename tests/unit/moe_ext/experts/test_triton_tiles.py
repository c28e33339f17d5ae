"""The triton backend's tables and bounds, which need neither triton nor a GPU."""

from typing import Any

import pytest
import torch

from moe_ext.experts import triton_tiles
from moe_ext.experts.triton_products import SortedRows


@pytest.mark.parametrize("counts", [[1] * 7, [0, 100, 0], [33, 31, 1, 64], [0], [129]], ids=str)
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_grid_holds_all_blocks_of_any_counts(counts: list[int], block: int) -> None:
    rows = SortedRows(counts=torch.tensor(counts), number=sum(counts), index=None)
    needed = sum(-(-count // block) for count in counts)
    assert needed <= rows.max_blocks(block) <= sum(counts) // block + len(counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 16, 100, 5632])
@pytest.mark.parametrize("rows_per_expert", [0, 16, 63, 64, 100_000])
def test_tiles_fit_the_hardware(dtype: torch.dtype, size: int, rows_per_expert: int) -> None:
    sizes: Any = {"rows_per_expert": rows_per_expert}
    row_sizes, ffn_sizes = {"outputs": size, "inputs": 3}, {"ffn": size, "width": 3}
    product = triton_tiles.product_tile(dtype, **sizes, **row_sizes)
    gated = triton_tiles.gated_tile(dtype, **sizes, **ffn_sizes)
    gradient = triton_tiles.gated_gradient_tile(dtype, **sizes, **ffn_sizes)
    weight = triton_tiles.weight_gradient_tile(dtype, **sizes, **row_sizes)
    for tile, matrices in ((product, 1), (gated, 2), (gradient, 1), (weight, 1)):
        blocks = (tile.block_m, tile.block_n, tile.block_k)
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        columns = matrices * tile.block_n
        # Of a Hopper multiprocessor: 64 Ki registers and 227 KiB of shared memory.
        programs = 2 if tile.max_registers == 128 else 1
        threads = 32 * tile.num_warps
        assert tile.block_m * columns // threads <= (tile.max_registers or 256) // 2
        operands = (tile.block_m + columns) * tile.block_k * dtype.itemsize * tile.num_stages
        assert programs * (operands + 1024) <= 227 * 1024
    assert product.block_n <= max(16, 2 * size) and weight.block_m <= max(16, 2 * size)
