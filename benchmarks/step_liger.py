"""Implements training steps of transformers' OLMoE with Liger's kernels in place of its modules."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer_transformers import family_name
from benchmarks.shapes import Shape
from benchmarks.step_peers import StepSubject, TransformersStep
from megatron.trainer.data.batch import Batch


class LigerStep(TransformersStep):
    """Trains as `TransformersStep` does, with Liger's norms, experts, and head fused with the loss.

    Liger 0.8.5 has no function that patches OLMoE, so its public modules replace transformers' as
    its functions for other models do it. The rotary embedding, SDPA and the router stay.

    Args:
        shape: model and batch; without an auxiliary loss.
        device: where.
        dtype: of the matrix products.
        has_master_weights: as for `TransformersStep`.
    """

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, *, has_master_weights: bool
    ) -> None:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )

        super().__init__(
            shape, device, dtype, experts="eager", has_master_weights=has_master_weights
        )
        replace_modules(self._model)
        self._loss = LigerFusedLinearCrossEntropyLoss()

    def loss_of(self, batch: Batch) -> Tensor:
        """See `TransformersStep`."""
        hidden = self._model.model(batch.tokens, use_cache=False).last_hidden_state
        loss: Tensor = self._loss(
            self._model.lm_head.weight, hidden.flatten(0, 1), batch.labels.flatten()
        )
        return loss


def replace_modules(model: Any) -> None:
    """Put Liger's norms and experts, with the same weights, in the place of OLMoE's."""
    from liger_kernel.transformers import LigerRMSNorm
    from liger_kernel.transformers.swiglu import (  # type: ignore[import-not-found]
        LigerExperts,
    )
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeRMSNorm

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, OlmoeRMSNorm):
                norm = LigerRMSNorm(len(module.weight), eps=module.variance_epsilon)
                setattr(parent, name, with_parameters(norm, module))
            elif isinstance(module, OlmoeExperts):
                with torch.device("meta"):
                    experts = LigerExperts(model.config)
                setattr(parent, name, with_parameters(experts, module))


def with_parameters(target: nn.Module, source: nn.Module) -> nn.Module:
    """Give a module the very parameters of another, whose names and shapes are the same."""
    given = dict(source.named_parameters())
    wanted = {name: tuple(weight.shape) for name, weight in target.named_parameters()}
    there = {name: tuple(weight.shape) for name, weight in given.items()}
    if wanted != there:
        raise ValueError(f"Liger's module has the weights {wanted}, transformers' {there}")
    for name, weight in given.items():
        setattr(target, name, weight)
    return target


def build(
    device: torch.device, shape: Shape, dtype: torch.dtype, has_master_weights: bool
) -> StepSubject:
    """Build the step in a worker."""
    if device.type != "cuda":
        raise ValueError(f"Liger's kernels run on GPUs, and the device is {device}")
    if family_name(shape) != "olmoe":
        raise ValueError("only OLMoE's modules are replaced by Liger's")
    return LigerStep(shape, device, dtype, has_master_weights=has_master_weights)
