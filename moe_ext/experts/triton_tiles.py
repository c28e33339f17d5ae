"""Chooses tiles of kernels from tables, so that the same shapes always sum in the same order.

A product of bf16 on Hopper is limited by what L2 can deliver before it is limited by the tensor
cores: a 128 x 128 tile reads a byte for every 64 multiplications, a 128 x 256 tile for every 85. So
products take the largest tile whose sums fit into the registers, one to a multiprocessor; kernels
that move much memory beside their product take smaller ones, two to a multiprocessor
(`max_registers`), so that one multiplies while the other reads or writes. Few rows per expert mean
that weights are read for little work, and small tiles waste the least of it.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Says how a grouped product is divided among the programs of its kernel."""

    block_m: int
    """Rows of the output."""
    block_n: int
    """Columns of the output; of gate and of up each, where a kernel makes both."""
    block_k: int
    """Terms of the sums that are in shared memory in one stage."""
    num_warps: int
    num_stages: int
    """Stages on their way through shared memory."""
    group_m: int = 8
    """Blocks of rows that go down the columns together."""
    max_registers: int | None = None
    """Of a thread; 128 let two programs of 8 warps share a multiprocessor. None: the compiler's."""


Table = tuple[tuple[int, Tile], ...]
"""Tiles, each with the number of rows per expert from which it is used; the largest first."""

_FEW = 16
_SOME = 32
_MANY = 64
# From here on a weight's gradient takes longer to compute than to add to an fp32 buffer:
# 2 n operations at 6e14 a second against 8 bytes at 3e12, for each element.
_VERY_MANY = 1024


def _tile(m: int, n: int, k: int, warps: int, stages: int, registers: int | None = None) -> Tile:
    return Tile(
        block_m=m,
        block_n=n,
        block_k=k,
        num_warps=warps,
        num_stages=stages,
        max_registers=registers,
    )


_PRODUCT: Table = (
    (_MANY, _tile(128, 256, 64, 8, 4)),
    (_SOME, _tile(64, 128, 64, 4, 4)),
    (_FEW, _tile(32, 128, 64, 4, 4)),
    (0, _tile(16, 128, 64, 4, 4)),
)
_GATED: Table = (
    (_MANY, _tile(128, 128, 64, 8, 4)),
    (_SOME, _tile(64, 64, 64, 4, 4)),
    (_FEW, _tile(32, 64, 64, 4, 4)),
    (0, _tile(16, 64, 64, 4, 4)),
)
_GATED_GRADIENT: Table = (
    (_MANY, _tile(128, 128, 64, 8, 3, 128)),
    (_SOME, _tile(64, 128, 64, 4, 4)),
    (_FEW, _tile(32, 128, 64, 4, 4)),
    (0, _tile(16, 128, 64, 4, 4)),
)
_WEIGHT_GRADIENT: Table = (
    (_VERY_MANY, _tile(128, 256, 64, 8, 4)),
    (_MANY, _tile(128, 128, 64, 8, 3, 128)),
    (0, _tile(128, 128, 32, 8, 4, 128)),
)
# fp32 is multiplied exactly, without tensor cores.
_FP32: Table = (
    (_SOME, _tile(64, 64, 32, 4, 3)),
    (0, _tile(16, 64, 32, 4, 3)),
)


def product_tile(dtype: torch.dtype, *, rows_per_expert: int, outputs: int, inputs: int) -> Tile:
    """Chooses for rows [t, inputs] by matrices [outputs, inputs], or their transposes.

    Args:
        dtype: of the operands.
        rows_per_expert: the mean.
        outputs: columns of the output.
        inputs: terms of each sum.
    """
    return _choose(_PRODUCT, dtype, rows_per_expert, outputs=outputs, inputs=inputs)


def gated_tile(dtype: torch.dtype, *, rows_per_expert: int, ffn: int, width: int) -> Tile:
    """Chooses for rows [t, width] by the pairs of matrices [ffn, width] of SwiGLU experts."""
    return _choose(_GATED, dtype, rows_per_expert, outputs=ffn, inputs=width)


def gated_gradient_tile(dtype: torch.dtype, *, rows_per_expert: int, ffn: int, width: int) -> Tile:
    """Chooses for gradients [t, width] by [width, ffn], and SwiGLU's gradient with them."""
    return _choose(_GATED_GRADIENT, dtype, rows_per_expert, outputs=ffn, inputs=width)


def weight_gradient_tile(
    dtype: torch.dtype, *, rows_per_expert: int, outputs: int, inputs: int
) -> Tile:
    """Chooses for the sum over an expert's rows of [t, outputs]^T by [t, inputs]."""
    table = _FP32[:1] if dtype == torch.float32 else _WEIGHT_GRADIENT
    tile = next((each for least, each in table if rows_per_expert >= least), table[-1][1])
    return replace(
        tile,
        block_m=min(tile.block_m, _power_of_two_from(outputs)),
        block_n=min(tile.block_n, _power_of_two_from(inputs)),
    )


def _choose(
    table: Table, dtype: torch.dtype, rows_per_expert: int, *, outputs: int, inputs: int
) -> Tile:
    table = _FP32 if dtype == torch.float32 else table
    tile = next(each for least, each in table if rows_per_expert >= least)
    return replace(
        tile,
        block_n=min(tile.block_n, _power_of_two_from(outputs)),
        block_k=min(tile.block_k, _power_of_two_from(inputs)),
    )


def _power_of_two_from(size: int) -> int:
    """Returns the smallest power of two that is at least `size` and 16, which `tl.dot` needs."""
    return max(16, 1 << (size - 1).bit_length())
