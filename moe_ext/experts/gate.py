"""Computes the element-wise middle of a SwiGLU expert, and its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_forward(projected: Tensor, probs: Tensor) -> Tensor:
    """Computes silu(gate) * up * prob.

    Args:
        projected: [t, 2f] gate's half, then up's.
        probs: [t] router weights.

    Returns:
        [t, f] of projected's dtype.
    """
    gate, up = projected.chunk(2, dim=-1)  # [t, f] each
    product = F.silu(gate).mul_(up)
    column = probs.unsqueeze(-1)  # [t, 1]
    if torch.result_type(product, column) == product.dtype:
        return product.mul_(column)
    return (product * column).to(projected.dtype)


def gated_backward(grad: Tensor, projected: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `gated_forward`, and its output again.

    Args:
        grad: [t, f] of the output.
        projected: [t, 2f] as given to `gated_forward`.
        probs: [t] as given to `gated_forward`.

    Returns:
        Gradient of projected [t, 2f], gradient of probs [t], and the output [t, f].
    """
    gate, up = projected.chunk(2, dim=-1)  # [t, f] each
    silu = F.silu(gate)
    product = silu * up
    column = probs.unsqueeze(-1)  # [t, 1]
    grad_probs = (grad.to(torch.promote_types(grad.dtype, probs.dtype)) * product).sum(dim=-1)
    grad_product = (grad * column).to(projected.dtype)
    grad_projected = torch.empty_like(projected)
    grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
    torch.mul(grad_product, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_product.mul_(up), gate, grad_input=grad_gate)
    output = (product * column).to(projected.dtype)
    return grad_projected, grad_probs.to(probs.dtype), output


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
