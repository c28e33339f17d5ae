"""Defines RMSNorm that megatron-core can build and that works under sequence parallelism."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.layers.parameters import new_parameter


class RMSNorm(nn.Module):
    """Applies a root-mean-square norm over the last dimension, with a weight and no bias.

    Statistics are taken in fp32 (fp64 for fp64 inputs); the normalised value is cast back to the
    input's dtype before the weight multiplies it, as OLMoE and JetMoE have it.

    Args:
        config: gives the parameter's dtype and place, and whether sequences are split over the
            tensor parallel group: megatron-core then sums the weight's gradient over it.
        hidden_size: width (h).
        eps: added to the mean square.
        ignored: what megatron-core passes to norms of other kinds.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(hidden_size, config=config)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., h] to [..., h]."""
        return unit_rms(hidden, self.eps) * self.weight


def unit_rms(hidden: Tensor, eps: float) -> Tensor:
    """Scales the last dimension to a root mean square of 1; [..., h] to [..., h], same dtype."""
    return F.rms_norm(hidden, (hidden.shape[-1],), eps=eps)


class _SplitUnitRMS(torch.autograd.Function):
    """Computes `unit_rms` of vectors whose elements are split over a process group.

    Both passes need one sum over the whole vector: of squares forward, of gradient times input
    backward. Both are all-reduced over the group, so every rank's slice of output and gradient is
    that of the whole vector. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        group: torch.distributed.ProcessGroup,
        eps: float,
    ) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mean_square = wide.square().sum(dim=-1, keepdim=True)  # [..., 1]
        torch.distributed.all_reduce(mean_square, group=group)  # sum over tensor parallel ranks
        mean_square /= wide.shape[-1] * group.size()
        scale = torch.rsqrt(mean_square + eps)
        ctx.save_for_backward(hidden, scale)
        ctx.group = group  # type: ignore[attr-defined]
        return (wide * scale).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        hidden, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        group = ctx.group  # type: ignore[attr-defined]
        normed = hidden.to(scale.dtype) * scale
        projection = (grad * normed).sum(dim=-1, keepdim=True)  # [..., 1]
        torch.distributed.all_reduce(projection, group=group)  # sum over tensor parallel ranks
        projection /= hidden.shape[-1] * group.size()
        return ((grad - normed * projection) * scale).to(hidden.dtype), None, None


def split_unit_rms(hidden: Tensor, eps: float, *, group: torch.distributed.ProcessGroup) -> Tensor:
    """Computes `unit_rms` over the concatenation of all the group's last dimensions.

    Args:
        hidden: [..., n] this rank's slice; every rank holds slices of the same width.
        eps: added to the mean square.
        group: the ranks that hold the slices; a collective in both passes.

    Returns:
        [..., n] this rank's slice of the result, hidden's dtype.
    """
    if group.size() == 1:
        return unit_rms(hidden, eps)
    output: Tensor = _SplitUnitRMS.apply(hidden, group, eps)
    return output
