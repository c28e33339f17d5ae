"""Computes SwiGLU of routed rows, silu(gate) * up * prob, in one pass each way.

A program has a row, which it reads in blocks: forward reads both halves and writes their product;
backward reads both and the product's gradient, and writes both halves' gradient, the product again
for the gradient of the next matrix, and the sum that is the gradient of the row's prob.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_ext.kernels.triton_jit import jit, tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024


@jit
def routed_unit_kernel(
    projected_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    output_ptr: tl.tensor,
    FFN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes silu(gate) * up * prob of rows [gate, up]."""
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs_ptr + row).to(tl.float32)
    for start in range(0, FFN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_real = columns < FFN
        gate_ptrs = projected_ptr + row * (2 * FFN) + columns
        gate = tl.load(gate_ptrs, mask=is_real, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + FFN, mask=is_real, other=0.0).to(tl.float32)
        product = (gate * tl.sigmoid(gate) * up * prob).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * FFN + columns, product, mask=is_real)


@jit
def routed_unit_gradient_kernel(
    grad_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    grad_projected_ptr: tl.tensor,
    grad_probs_ptr: tl.tensor,
    output_ptr: tl.tensor,
    FFN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gradients of rows [gate, up] and of their probs, and the forward's output."""
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs_ptr + row).to(tl.float32)
    dtype = grad_projected_ptr.dtype.element_ty
    of_prob = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, FFN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_real = columns < FFN
        offsets = row * (2 * FFN) + columns
        gate = tl.load(projected_ptr + offsets, mask=is_real, other=0.0).to(tl.float32)
        up = tl.load(projected_ptr + offsets + FFN, mask=is_real, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * FFN + columns, mask=is_real, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        of_prob += grad * product
        grad *= prob
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_projected_ptr + offsets, grad_gate.to(dtype), mask=is_real)
        tl.store(grad_projected_ptr + offsets + FFN, (grad * silu).to(dtype), mask=is_real)
        output = (product * prob).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * FFN + columns, output, mask=is_real)
    tl.store(grad_probs_ptr + row, tl.sum(of_prob, axis=0).to(grad_probs_ptr.dtype.element_ty))


def routed_unit(projected: Tensor, probs: Tensor) -> Tensor:
    """Computes silu(gate) * up * prob, without a gradient.

    Args:
        projected: [t, 2f] gate's half, then up's.
        probs: [t].

    Returns:
        [t, f] of projected's dtype, rounded once.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(projected, probs)
    projected, probs = projected.contiguous(), probs.contiguous()
    rows, ffn = projected.shape[0], projected.shape[1] // 2
    output = projected.new_empty(rows, ffn)
    if output.numel():
        routed_unit_kernel[(rows,)](projected, probs, output, **options(ffn))
    return output


def routed_unit_gradient(
    grad: Tensor, projected: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `routed_unit`, and its output again.

    Args:
        grad: [t, f] of the output.
        projected: [t, 2f] as given to `routed_unit`.
        probs: [t] as given to `routed_unit`.

    Returns:
        Gradient of projected [t, 2f], gradient of probs [t], and the output [t, f].

    Raises:
        ValueError: shapes do not fit.
    """
    _check(projected, probs, grad)
    projected, probs = projected.contiguous(), probs.contiguous()
    rows, ffn = projected.shape[0], projected.shape[1] // 2
    output = projected.new_empty(rows, ffn)
    grad_projected, grad_probs = torch.empty_like(projected), torch.empty_like(probs)
    if rows:
        routed_unit_gradient_kernel[(rows,)](
            grad.contiguous(),
            projected,
            probs,
            grad_projected,
            grad_probs,
            output,
            **options(ffn),
        )
    return grad_projected, grad_probs, output


def _check(projected: Tensor, probs: Tensor, grad: Tensor | None = None) -> None:
    rows, width = projected.shape
    fits = width % 2 == 0 and width > 0 and probs.shape == (rows,)
    if not fits or (grad is not None and grad.shape != (rows, width // 2)):
        raise ValueError(
            f"projected {tuple(projected.shape)}, probs {tuple(probs.shape)} and gradient"
            f" {None if grad is None else tuple(grad.shape)} do not fit; give [t, 2f], [t], [t, f]"
        )


def options(ffn: int) -> dict[str, Any]:
    """Returns the kernels' constants; the width is one, so that loads are as wide as it allows."""
    block = min(_BLOCK, 1 << (ffn - 1).bit_length())
    # 8 elements of 2 bytes, one load, for each thread and half.
    return {"FFN": ffn, "BLOCK": block, "num_warps": max(1, block // 256)}
