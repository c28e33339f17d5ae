"""Defines norms that megatron-core can build and that work under sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.kernels import fused
from moe_ext.kernels.fused import FusedKernels
from moe_ext.layers.parameters import new_parameter


class _Norm(nn.Module):
    """Takes what megatron-core builds norms with, of which norms here need the epsilon.

    Args:
        config: not needed.
        hidden_size: not needed.
        eps: what megatron-core hands every norm.
        own_eps: instead of eps.
        ignored: what megatron-core passes to norms of other kinds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        own_eps: float | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        del config, hidden_size
        self.eps = eps if own_eps is None else own_eps


class RMSNorm(_Norm):
    """Applies a root-mean-square norm over the last dimension, with a weight and no bias.

    Statistics are taken in fp32 (fp64 for fp64 inputs); the normalised value is cast back to the
    input's dtype before the weight multiplies it, as OLMoE and JetMoE have it.

    Args:
        config: gives the parameter's dtype and place, and whether sequences are split over the
            tensor parallel group: megatron-core then sums the weight's gradient over it.
        hidden_size: width (h).
        eps: added to the mean square.
        others: as `_Norm`.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **others: Any
    ) -> None:
        super().__init__(config, hidden_size, eps, **others)
        self.weight = new_parameter(hidden_size, config=config)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        nn.init.ones_(self.weight)
        self.fused_kernels = fused.setting_of(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., h] to [..., h]."""
        return weighted_unit_rms(hidden, self.weight, self.eps, fused_kernels=self.fused_kernels)


class NonParametricLayerNorm(_Norm):
    """Applies LayerNorm over the last dimension, without weight and bias (OLMo).

    Statistics are taken in fp32 (fp64 for fp64 inputs); eps is added to the variance.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., h] to [..., h]."""
        return unit_variance(hidden, self.eps)


def norm_class(normalization: str) -> type[RMSNorm] | type[NonParametricLayerNorm]:
    """Returns the norm of hidden states that `ModelFields.normalization` names."""
    return RMSNorm if normalization == "RMSNorm" else NonParametricLayerNorm


def unit_variance(hidden: Tensor, eps: float) -> Tensor:
    """Shifts and scales the last dimension to a mean of 0 and a variance of 1, same dtype."""
    wide = hidden
    if not hidden.is_cuda:  # whose kernel has statistics in fp32 whatever the input
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return F.layer_norm(wide, (hidden.shape[-1],), eps=eps).to(hidden.dtype)


def unit_rms(hidden: Tensor, eps: float) -> Tensor:
    """Scales the last dimension to a root mean square of 1; [..., h] to [..., h], same dtype."""
    return F.rms_norm(hidden, (hidden.shape[-1],), eps=eps)


def weighted_unit_rms(
    hidden: Tensor, weight: Tensor, eps: float, *, fused_kernels: FusedKernels
) -> Tensor:
    """Computes `unit_rms` times a weight, in a kernel where one takes it.

    Args:
        hidden: [..., h], or [..., heads, h / heads] to be normalised over all heads.
        weight: [h].
        eps: added to the mean square.
        fused_kernels: whether a kernel may compute it.

    Returns:
        hidden's shape and dtype.
    """
    if hidden.dtype == weight.dtype and fused.takes(fused_kernels, hidden, weight):
        from moe_ext.kernels import rms_norm

        if len(weight) <= rms_norm.WIDEST:
            return rms_norm.rms_norm(hidden, weight, eps)
    if hidden.shape[-1] != len(weight):
        return (unit_rms(hidden.flatten(-2), eps) * weight).view(hidden.shape)
    return unit_rms(hidden, eps) * weight


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
    output: Tensor = _SplitUnitRMS.apply(hidden, group, eps)
    return output


class _SplitUnitVariance(torch.autograd.Function):
    """Computes `unit_variance` of vectors whose elements are split over a process group.

    The forward pass sums elements, then squared deviations, over the whole vector; the backward
    pass sums the gradient and the gradient times the output, in one call. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, group: torch.distributed.ProcessGroup, eps: float
    ) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        width = wide.shape[-1] * group.size()
        mean = wide.sum(dim=-1, keepdim=True)  # [..., 1]
        torch.distributed.all_reduce(mean, group=group)  # sum over tensor parallel ranks
        mean /= width
        variance = (wide - mean).square().sum(dim=-1, keepdim=True)  # [..., 1]
        torch.distributed.all_reduce(variance, group=group)  # sum over tensor parallel ranks
        scale = torch.rsqrt(variance / width + eps)
        ctx.save_for_backward(hidden, mean, scale)
        ctx.group = group
        return ((wide - mean) * scale).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        hidden, mean, scale = ctx.saved_tensors
        normed = (hidden.to(scale.dtype) - mean) * scale
        grad = grad.to(scale.dtype)
        sums = torch.cat(
            [grad.sum(dim=-1, keepdim=True), (grad * normed).sum(dim=-1, keepdim=True)], dim=-1
        )  # [..., 2]
        torch.distributed.all_reduce(sums, group=ctx.group)  # sum over tensor parallel ranks
        sums /= hidden.shape[-1] * ctx.group.size()
        own, projection = sums.split(1, dim=-1)
        return ((grad - own - normed * projection) * scale).to(hidden.dtype), None, None


def split_unit_variance(
    hidden: Tensor, eps: float, *, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Computes `unit_variance` over the concatenation of all the group's last dimensions.

    Args:
        hidden: [..., n] this rank's slice; every rank holds slices of the same width.
        eps: added to the variance.
        group: the ranks that hold the slices; collectives in both passes.

    Returns:
        [..., n] this rank's slice of the result, hidden's dtype.
    """
    output: Tensor = _SplitUnitVariance.apply(hidden, group, eps)
    return output
