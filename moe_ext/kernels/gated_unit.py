"""Computes SwiGLU of dense layers, silu(gate) * up, in one pass each way.

Forward reads both halves and writes their product; backward reads both and the product's gradient,
and writes both halves' gradient. Between the two only the projection is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024


@jit
def gated_unit_kernel(
    projected_ptr: tl.tensor, output_ptr: tl.tensor, FFN: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Writes silu(gate) * up of rows [gate, up]."""
    row = (tl.program_id(0) // tl.cdiv(FFN, BLOCK)).to(tl.int64)
    columns = tl.program_id(0) % tl.cdiv(FFN, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    is_real = columns < FFN
    gate_ptrs = projected_ptr + row * (2 * FFN) + columns
    gate = tl.load(gate_ptrs, mask=is_real, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + FFN, mask=is_real, other=0.0).to(tl.float32)
    product = (gate * tl.sigmoid(gate) * up).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * FFN + columns, product, mask=is_real)


@jit
def gated_unit_gradient_kernel(
    grad_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    grad_projected_ptr: tl.tensor,
    FFN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gradient of rows [gate, up] from that of their products."""
    row = (tl.program_id(0) // tl.cdiv(FFN, BLOCK)).to(tl.int64)
    columns = tl.program_id(0) % tl.cdiv(FFN, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    is_real = columns < FFN
    offsets = row * (2 * FFN) + columns
    gate = tl.load(projected_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
    up = tl.load(projected_ptr + offsets + FFN, mask=is_real, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * FFN + columns, mask=is_real, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = grad_projected_ptr.dtype.element_ty
    tl.store(grad_projected_ptr + offsets, grad_gate.to(dtype), mask=is_real)
    tl.store(grad_projected_ptr + offsets + FFN, (grad * silu).to(dtype), mask=is_real)


class GatedUnit(torch.autograd.Function):
    """Multiplies silu of one half by the other. Differentiable once."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, projected: Tensor) -> Tensor:
        """Computes [..., f] of projected [..., 2f]."""
        projected = projected.contiguous()
        ffn = projected.shape[-1] // 2
        output = projected.new_empty(*projected.shape[:-1], ffn)
        if output.numel():
            constants = options(ffn)
            gated_unit_kernel[_grid(output, constants)](projected, output, **constants)
        ctx.save_for_backward(projected)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """Computes the gradient of projected."""
        (projected,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_projected: Tensor = torch.empty_like(projected)
        if grad.numel():
            constants = options(grad.shape[-1])
            gated_unit_gradient_kernel[_grid(grad, constants)](
                grad.contiguous(), projected, grad_projected, **constants
            )
        return grad_projected


def gated_unit(projected: Tensor) -> Tensor:
    """Computes silu(gate) * up.

    Differentiable once.

    Args:
        projected: [..., 2f], gate before up.

    Returns:
        [..., f] of the same dtype, rounded once.

    Raises:
        ValueError: the width is odd.
    """
    if projected.shape[-1] % 2:
        raise ValueError(f"projected is {tuple(projected.shape)}; give as many gates as ups")
    output: Tensor = GatedUnit.apply(projected)
    return output


def options(ffn: int) -> dict[str, Any]:
    """Returns the kernels' constants; the width is one, so that loads are as wide as it allows."""
    block = min(_BLOCK, 1 << (ffn - 1).bit_length())
    # 8 elements of 2 bytes, one load, for each thread and half.
    return {"FFN": ffn, "BLOCK": block, "num_warps": max(1, block // 256)}


def _grid(output: Tensor, constants: dict[str, Any]) -> tuple[int]:
    ffn = output.shape[-1]
    return (output.numel() // ffn * -(-ffn // constants["BLOCK"]),)
