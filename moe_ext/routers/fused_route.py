"""Routes in the kernels of `moe_ext/kernels/router_choice.py` and `router_losses.py`."""

from typing import Any, ClassVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moe_ext.functional import Routing
from moe_ext.kernels.router_choice import MOST_EXPERTS, RouterRule, Sums, select
from moe_ext.kernels.router_losses import Losses, differentiable, router_losses
from moe_ext.metrics import RouterMetrics
from moe_ext.routers.balancing import Balancing, StepCounts, sum_over_ranks

_IN_KERNELS = ("select", "_within_capacity", "_attach_losses", "_record")
"""The methods of `MoERouter` whose work the kernels do, or do without."""


def _giver(cls: type, name: str) -> type:
    """Returns the class that gives an attribute its value; object if none does."""
    return next((each for each in cls.__mro__ if name in vars(each)), object)


class KernelRouting(MegatronModule):
    """Routes in kernels where they do what a router does; `MoERouter` has the rest of it."""

    fused_rule: ClassVar[RouterRule | None] = None
    """The rule of the kernels that `select` is; None if it is another. A class that takes `select`
    or a loss from elsewhere than the rule has none unless it says so itself."""
    num_experts: int
    topk: int
    aux_loss_coeff: float
    z_loss_coeff: float
    expert_bias: Tensor | None
    balancing: Balancing
    step: StepCounts
    token_group: torch.distributed.ProcessGroup
    metrics: RouterMetrics
    layer_number: int | None

    def __init_subclass__(cls, **others: Any) -> None:
        """Leaves to torch what a class, or a mixin of it, does in place of the kernels."""
        super().__init_subclass__(**others)
        giver = _giver(cls, "fused_rule")
        if not all(issubclass(giver, _giver(cls, name)) for name in _IN_KERNELS):
            cls.fused_rule = None

    def fits_kernels(self, logits: Tensor) -> bool:
        """Says whether what this router does is what the kernels do.

        A rule that is none of theirs (`fused_rule`), a loss by sequence, a capacity, more than
        `MOST_EXPERTS` experts and no tokens at all are left to torch.

        Args:
            logits: [t, e].
        """
        balancing = self.balancing
        is_plain = balancing.loss != "seq_aux_loss" and balancing.capacity_factor is None
        is_sized = len(logits) > 0 and 1 <= self.topk <= self.num_experts <= MOST_EXPERTS
        return self.fused_rule is not None and is_plain and is_sized

    def route_in_kernels(self, logits: Tensor, is_token: Tensor | None) -> Routing:
        """Computes `MoERouter.route` of what `fits_kernels`; a collective call, as that is.

        Args:
            logits: [t, e].
            is_token: [t] bool, False for padding; None for none.
        """
        rule = self.fused_rule
        assert rule is not None  # fits_kernels
        has_losses = self.training and torch.is_grad_enabled()
        found = select(
            logits.detach(),
            rule,
            self.topk,
            bias=self.expert_bias,
            is_token=is_token,
            with_sums=has_losses,
        )
        losses = None if found.sums is None else self._losses(found.sums)
        gates, scores, addend = differentiable(logits, found, losses, rule, is_token)
        if losses is not None:
            self.metrics.add(self.known_layer(), losses.record)
            gates = MoEAuxLossAutoScaler.apply(gates, addend)
        return Routing(experts=found.experts, gates=gates, scores=scores)

    def _losses(self, sums: Sums) -> Losses:
        """Makes a micro-batch's losses; counts are summed first over ranks that share it."""
        balancing, group_size = self.balancing, self.token_group.size()
        is_global = balancing.loss == "global_aux_loss"
        counts = share_counts = None
        if group_size > 1 or balancing.has_bias or is_global:
            counts = sum_over_ranks(sums.counts.sum(dim=0), self.token_group)  # [e] int64
            if balancing.has_bias:
                self.step.add(counts)
            if is_global:
                share_counts = self.step.add_everywhere(counts, self.layer_number)
        return router_losses(
            sums,
            self.topk,
            balance_coeff=self.aux_loss_coeff,
            z_coeff=self.z_loss_coeff,
            batch_share=1.0 / group_size,
            counts=counts,
            share_counts=share_counts,
        )

    def known_layer(self) -> int:
        """Returns the layer's number.

        Raises:
            ValueError: it was not set.
        """
        if self.layer_number is None:
            raise ValueError("the router has no layer number; call set_layer_number first")
        return self.layer_number
