"""Computes RMSNorm with its weight in one pass each way.

A program normalises BLOCK_ROWS rows at a time, which it holds in registers: forward reads and
writes a row once, backward reads it and its gradient and writes one. What is kept is the input and
one number a row. Queries and keys are read where their projection left them, head by head between
those of the others, so that neither is ever copied.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 8192
"""Elements of the widest row that fits into a program's registers."""
_TILE = 2048
"""Elements a program holds at least, where there are as many."""
PARTS = 512
"""Programs in backward at most, each with its own sum of the weight's gradient: all that Hopper's
132 multiprocessors run at one time. A constant, so that sums have the same order everywhere."""


@jit
def rms_norm_kernel(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    output_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes hidden / rms(hidden), rounded, times weight to output, and 1 / rms to scale.

    Of hidden, a row is at multiples of ROW_STRIDE, its groups of GROUP elements at multiples of
    GROUP_STRIDE from there.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    hidden, offsets, is_real = load_rows(
        hidden_ptr, rows, num_rows, WIDTH, ROW_STRIDE, GROUP, GROUP_STRIDE, BLOCK
    )
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / WIDTH + eps)
    dtype = output_ptr.dtype.element_ty
    normed = (hidden * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(output_ptr + offsets, (normed * weight[None, :]).to(dtype), mask=is_real)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


@jit
def rms_norm_gradient_kernel(
    grad_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    grad_hidden_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_part: tl.tensor,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes the gradient of hidden, and each program's sum of that of the weight to parts."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, num_rows)
    dtype = grad_hidden_ptr.dtype.element_ty
    for start in range(first, last, BLOCK_ROWS):
        rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        hidden, offsets, is_real = load_rows(
            hidden_ptr, rows, last, WIDTH, ROW_STRIDE, GROUP, GROUP_STRIDE, BLOCK
        )
        grad = tl.load(grad_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < last, other=0.0)
        normed = hidden * scale[:, None]
        total += grad * normed.to(dtype).to(tl.float32)
        grad = grad * weight[None, :]
        projection = tl.sum(grad * normed, axis=1) / WIDTH
        grad_hidden = (grad - normed * projection[:, None]) * scale[:, None]
        tl.store(grad_hidden_ptr + offsets, grad_hidden.to(dtype), mask=is_real)
    tl.store(parts_ptr + part.to(tl.int64) * WIDTH + columns, tl.sum(total, axis=0), is_column)


@jit
def load_rows(
    hidden_ptr: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Loads rows before `end`; returns their places in dense rows, too, and which are real."""
    columns = tl.arange(0, BLOCK)
    is_real = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    within = columns // GROUP * GROUP_STRIDE + columns % GROUP
    places = rows[:, None] * ROW_STRIDE + within[None, :]
    hidden = tl.load(hidden_ptr + places, mask=is_real, other=0.0).to(tl.float32)
    return hidden, rows[:, None] * WIDTH + columns[None, :], is_real


class Lines(NamedTuple):
    """Says where the rows of a tensor are, in elements."""

    row_stride: int
    group: int
    """Elements that are next to each other."""
    group_stride: int

    def arguments(self) -> dict[str, int]:
        """Returns the kernels' constants."""
        return {
            "ROW_STRIDE": self.row_stride,
            "GROUP": self.group,
            "GROUP_STRIDE": self.group_stride,
        }


def lines_of(hidden: Tensor, width: int) -> Lines | None:
    """Finds rows of one or two last dimensions, `width` elements in all; None if irregular."""
    own = 1 if hidden.shape[-1] == width else 2
    *leading, last = zip(hidden.shape, hidden.stride(), strict=True)
    heads, leading = leading[len(leading) - own + 1 :], leading[: len(leading) - own + 1]
    # The stride of a dimension of one element means nothing.
    steps = [(size, stride) for size, stride in leading if size != 1]
    is_regular = last[1] == 1 or last[0] == 1
    for (_, stride), (size, inner) in itertools.pairwise(steps):
        is_regular &= stride == inner * size
    if not is_regular:
        return None
    return Lines(steps[-1][1] if steps else width, last[0], heads[0][1] if heads else width)


class WeightedRMSNorm(torch.autograd.Function):
    """Normalises rows and multiplies them by a weight. Differentiable once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """Computes hidden's shape of hidden, whose last one or two dimensions are rows [h]."""
        width = len(weight)
        if lines_of(hidden, width) is None:
            hidden = hidden.contiguous()
        number = hidden.numel() // width
        output = hidden.new_empty(hidden.shape)
        scale = hidden.new_empty(number, dtype=torch.float32)
        if number:
            constants = {**options(width), **_lines(hidden, width)}
            grid = -(-number // constants["BLOCK_ROWS"])
            rms_norm_kernel[(grid,)](
                hidden, weight, output, scale, num_rows=number, eps=eps, **constants
            )
        ctx.save_for_backward(hidden, weight, scale)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Computes the gradients of hidden and weight."""
        hidden, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        number, width = len(scale), len(weight)
        grad_hidden = hidden.new_empty(hidden.shape)
        constants = options(width)
        block = constants["BLOCK_ROWS"]
        # Whole blocks of rows, as many for each program.
        per_part = max(1, -(-number // (PARTS * block))) * block
        parts = hidden.new_empty(-(-number // per_part), width, dtype=torch.float32)
        if number:
            rms_norm_gradient_kernel[(len(parts),)](
                grad.contiguous(),
                hidden,
                weight,
                scale,
                grad_hidden,
                parts,
                num_rows=number,
                rows_per_part=per_part,
                **constants,
                **_lines(hidden, width),
            )
        return grad_hidden, parts.sum(dim=0).to(weight.dtype), None


def _lines(hidden: Tensor, width: int) -> dict[str, int]:
    lines = lines_of(hidden, width)
    assert lines is not None  # forward saw to it
    return lines.arguments()


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scales rows to a root mean square of 1, rounds, and multiplies them by the weight.

    Differentiable once. Statistics are fp32.

    Args:
        hidden: [..., h], or [..., heads, h / heads] to be normalised over all heads.
        weight: [h] of the same dtype, h at most `WIDEST`.
        eps: added to the mean square.

    Returns:
        hidden's shape and dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    width = weight.numel()
    is_whole = width in (hidden.shape[-1], hidden.shape[-2:].numel())
    if not is_whole or hidden.dtype != weight.dtype or width > WIDEST:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} of {hidden.dtype} and weight {tuple(weight.shape)} of"
            f" {weight.dtype}; both must have one dtype and width, at most {WIDEST}"
        )
    output: Tensor = WeightedRMSNorm.apply(hidden, weight, eps)
    return output


def options(width: int) -> dict[str, Any]:
    """Returns the kernels' constants; the width is one, so that loads are as wide as it allows."""
    block = 1 << (width - 1).bit_length()
    rows = max(1, _TILE // block)
    # 16 elements of 2 bytes, two loads, for each thread.
    return {
        "WIDTH": width,
        "BLOCK": block,
        "BLOCK_ROWS": rows,
        "num_warps": min(16, max(1, rows * block // 512)),
    }
