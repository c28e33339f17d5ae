"""Computes RMSNorm over all heads of queries or keys, and their rotary embedding, in one pass.

A program has a row, all heads of one position, as two tiles: the first and the second half of every
head's channels, which the embedding rotates against each other. So both are read once and written
once, backward too, and read where their projection left them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_ext.kernels.rms_norm import PARTS, WIDEST, lines_of
from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor


@jit
def rotated_norm_kernel(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    output_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS_PER_ANGLE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Writes hidden / rms(hidden), rounded, times weight, rotated, and 1 / rms to scale."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    channels = tl.arange(0, BLOCK_HALF)
    is_channel = channels < HALF
    is_real = (heads < HEADS) & is_channel[None, :]
    columns = heads * (2 * HALF) + channels[None, :]
    places = hidden_ptr + row * ROW_STRIDE + heads * HEAD_STRIDE + channels[None, :]
    first, second = load_halves(places, is_real, HALF)
    weight1, weight2 = load_halves(weight_ptr + columns, is_real, HALF)
    angles = row // ROWS_PER_ANGLE * HALF + channels
    cos = tl.load(cos_ptr + angles, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angles, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    squares = tl.sum(tl.sum(first * first + second * second, axis=1), axis=0)
    scale = tl.rsqrt(squares / (2 * HALF * HEADS) + eps)
    dtype = output_ptr.dtype.element_ty
    first = ((first * scale).to(dtype).to(tl.float32) * weight1).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * weight2).to(dtype).to(tl.float32)
    outputs = output_ptr + row * (2 * HALF * HEADS) + columns
    tl.store(outputs, (first * cos - second * sin).to(dtype), mask=is_real)
    tl.store(outputs + HALF, (second * cos + first * sin).to(dtype), mask=is_real)
    tl.store(scale_ptr + row, scale)


@jit
def rotated_norm_gradient_kernel(
    grad_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    grad_hidden_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    rows_per_part: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS_PER_ANGLE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Writes the gradient of hidden, and each program's sum of that of the weight to parts."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    channels = tl.arange(0, BLOCK_HALF)
    is_channel = channels < HALF
    is_real = (heads < HEADS) & is_channel[None, :]
    columns = heads * (2 * HALF) + channels[None, :]
    weight1, weight2 = load_halves(weight_ptr + columns, is_real, HALF)
    total1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    total2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    dtype = grad_hidden_ptr.dtype.element_ty
    width = 2 * HALF * HEADS
    first_row = tl.program_id(0).to(tl.int64) * rows_per_part
    for step in range(0, tl.minimum(rows_per_part, num_rows - first_row)):
        row = first_row + step
        places = hidden_ptr + row * ROW_STRIDE + heads * HEAD_STRIDE + channels[None, :]
        scale = tl.load(scale_ptr + row)
        first, second = load_halves(places, is_real, HALF)
        first *= scale
        second *= scale
        lines = row * width + columns
        grad1, grad2 = load_halves(grad_ptr + lines, is_real, HALF)
        angles = row // ROWS_PER_ANGLE * HALF + channels
        cos = tl.load(cos_ptr + angles, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + angles, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        back1 = grad1 * cos + grad2 * sin
        back2 = grad2 * cos - grad1 * sin
        total1 += back1 * first.to(dtype).to(tl.float32)
        total2 += back2 * second.to(dtype).to(tl.float32)
        back1 *= weight1
        back2 *= weight2
        projection = tl.sum(tl.sum(back1 * first + back2 * second, axis=1), axis=0) / width
        of_first = ((back1 - first * projection) * scale).to(dtype)
        of_second = ((back2 - second * projection) * scale).to(dtype)
        tl.store(grad_hidden_ptr + lines, of_first, mask=is_real)
        tl.store(grad_hidden_ptr + lines + HALF, of_second, mask=is_real)
    lines = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(parts_ptr + lines, total1, mask=is_real)
    tl.store(parts_ptr + lines + HALF, total2, mask=is_real)


@jit
def load_halves(
    places: tl.tensor, is_real: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Loads the first halves of heads, which are at `places`, and the second ones."""
    first = tl.load(places, mask=is_real, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=is_real, other=0.0).to(tl.float32)
    return first, second


class RotatedNorm(torch.autograd.Function):
    """Normalises all heads of a position together and rotates each. Differentiable once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        heads: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> Tensor:
        """Computes [s, b, heads, hn] of the same, with cos and sin [s, 1 or b, hn / 2]."""
        if lines_of(heads, len(weight)) is None:
            heads = heads.contiguous()
        output = heads.new_empty(heads.shape)
        number = heads.shape[0] * heads.shape[1]
        scale = heads.new_empty(number, dtype=torch.float32)
        if number:
            rotated_norm_kernel[(number,)](
                heads, weight, cos, sin, output, scale, eps=eps, **_constants(heads, cos)
            )
        ctx.save_for_backward(heads, weight, cos, sin, scale)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Computes the gradients of heads and weight."""
        heads, weight, cos, sin, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        number = len(scale)
        grad_heads = heads.new_empty(heads.shape)
        per_part = max(1, -(-number // PARTS))
        parts = heads.new_empty(-(-number // per_part), len(weight), dtype=torch.float32)
        if number:
            rotated_norm_gradient_kernel[(len(parts),)](
                grad.contiguous(),
                heads,
                weight,
                cos,
                sin,
                scale,
                grad_heads,
                parts,
                num_rows=number,
                rows_per_part=per_part,
                **_constants(heads, cos),
            )
        return grad_heads, parts.sum(dim=0).to(weight.dtype), None, None, None


def rotated_norm(heads: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """Scales all heads of a position to a root mean square of 1, weighs them, and rotates each.

    Differentiable once, in heads and weight. Sines and cosines are rounded to the heads' dtype, as
    megatron-core has it.

    Args:
        heads: [s, b, heads, hn], hn even.
        weight: [heads * hn] of the same dtype, `rms_norm.WIDEST` numbers at most.
        angles: [s, 1 or b, 1, hn] of RoPE, both halves alike.
        eps: added to the mean square.

    Returns:
        [s, b, heads, hn] of heads' dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    length, batch, number, channels = heads.shape
    fits = channels % 2 == 0 and weight.shape == (number * channels,) and len(weight) <= WIDEST
    fits &= weight.dtype == heads.dtype
    if not fits or angles.shape not in [(length, rows, 1, channels) for rows in (1, batch)]:
        raise ValueError(
            f"heads {tuple(heads.shape)} of {heads.dtype}, weight {tuple(weight.shape)} of"
            f" {weight.dtype} and angles {tuple(angles.shape)} do not fit: give [s, b, heads, hn],"
            f" [heads * hn], at most {WIDEST}, and [s, 1 or b, 1, hn]"
        )
    half = angles[:, :, 0, : channels // 2]
    cos, sin = (each.to(heads.dtype).contiguous() for each in (half.cos(), half.sin()))
    output: Tensor = RotatedNorm.apply(heads, weight, cos, sin, eps)
    return output


def options(number: int, channels: int) -> dict[str, Any]:
    """Returns constants of the kernels for so many heads of so many channels."""
    half = channels // 2
    blocks = 1 << (number - 1).bit_length(), 1 << (half - 1).bit_length()
    return {
        "HEADS": number,
        "HALF": half,
        "BLOCK_HEADS": blocks[0],
        "BLOCK_HALF": blocks[1],
        "num_warps": min(16, max(1, blocks[0] * blocks[1] // 256)),
    }


def _constants(heads: Tensor, cos: Tensor) -> dict[str, Any]:
    _, batch, number, channels = heads.shape
    lines = lines_of(heads, number * channels)
    assert lines is not None  # forward saw to it
    return {
        **options(number, channels),
        "ROW_STRIDE": lines.row_stride,
        "HEAD_STRIDE": lines.group_stride,
        "ROWS_PER_ANGLE": batch // cos.shape[1],
    }
