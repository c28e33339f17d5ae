"""Computes the element-wise middle of a SwiGLU expert, and its gradient."""

import functools

import torch
from torch import Tensor

from moe_ext.experts.scratch import Scratch


def gated_forward(projected: Tensor, probs: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Computes silu(gate) * up * prob.

    Args:
        projected: [t, 2f] gate's half, then up's.
        probs: [t] router weights.
        scratch: of projected's dtype, whose memory the result is in; None for memory of its own.

    Returns:
        [t, f] of projected's dtype.
    """
    gate, up = projected.chunk(2, dim=-1)  # [t, f] each
    scratch = scratch or Scratch(projected, len(projected))
    product = torch.ops.aten.silu.out(gate, out=scratch.take("product", *gate.shape))
    return product.mul_(up).mul_(probs.unsqueeze(-1))


def gated_backward(
    grad: Tensor, projected: Tensor, probs: Tensor, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `gated_forward`, and its output again.

    Args:
        grad: [t, f] of the output.
        projected: [t, 2f] as given to `gated_forward`.
        probs: [t] as given to `gated_forward`.
        scratch: of projected's dtype, whose memory the results of that dtype are in; None for
            memory of their own.

    Returns:
        Gradient of projected [t, 2f], gradient of probs [t], and the output [t, f].
    """
    gate, up = projected.chunk(2, dim=-1)  # [t, f] each
    scratch = scratch or Scratch(projected, len(projected))
    take = functools.partial(scratch.take, number=len(gate), width=gate.shape[1])
    silu = torch.ops.aten.silu.out(gate, out=take("silu"))
    product = torch.mul(silu, up, out=take("product"))
    column = probs.unsqueeze(-1)  # [t, 1]
    if torch.promote_types(grad.dtype, probs.dtype) == projected.dtype:
        grad_probs = torch.mul(grad, product, out=take("grad_product")).sum(dim=-1)
    else:
        grad_probs = (grad.to(torch.promote_types(grad.dtype, probs.dtype)) * product).sum(dim=-1)
    grad_product = torch.mul(grad, column, out=take("grad_product"))
    grad_projected = scratch.take("grad_projected", *projected.shape)
    grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
    torch.mul(grad_product, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
    return grad_projected, grad_probs.to(probs.dtype), product.mul_(column)


class GatedActivation(torch.autograd.Function):
    """Applies `gated_forward` and keeps its two inputs alone for backward.

    Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, projected: Tensor, probs: Tensor
    ) -> Tensor:
        """Computes `gated_forward`."""
        ctx.save_for_backward(projected, probs)
        return gated_forward(projected, probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Computes `gated_backward`."""
        projected, probs = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_projected, grad_probs, _ = gated_backward(grad, projected, probs)
        return grad_projected, grad_probs
