"""Defines the base of all routers; a routing rule is a subclass that fills in `select`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.functional import Routing, dense_routing, router_z_loss, routing_entropy, sort_choices
from moe_ext.kernels import fused
from moe_ext.layers.lora import Adapter, LoRA
from moe_ext.layers.parameters import new_parameter
from moe_ext.metrics import RouterMetrics
from moe_ext.routers.balancing import Balancing, StepCounts, balancing_loss, count_assignments
from moe_ext.routers.fused_route import KernelRouting
from moe_ext.routers.whole import TokenSplit
from moe_ext.unequal import DenseRouting, within_capacity


class MoERouter(KernelRouting, ABC):
    """Routes tokens: a linear gate, a rule that selects experts, and the router's two losses.

    Under tensor and context parallelism the tokens of a micro-batch lie on several ranks; their
    counts are summed over `pg_collection.tp_cp`, so that losses and gradients are those of the
    whole micro-batch. Padding is routed, for its rows are there, but is in no loss and no count:
    both are those of the same texts without padding. megatron-core sums the gate's gradient over
    tensor parallel ranks because its weight is marked `sequence_parallel`. Without sequence
    parallelism each tensor parallel rank routes all tokens, and has the whole gradient itself.

    Args:
        config: megatron-core's; its own auxiliary-loss fields are not read.
        pg_collection: this rank's groups; tp, cp and tp_cp are used.
        aux_loss_coeff: multiplies this layer's load-balancing loss.
        z_loss_coeff: multiplies this layer's z-loss.
        router_dtype: precision of the gate's product; None means the hidden states'.
        metrics: where each training micro-batch is recorded.
        num_experts: e; None means the config's, those of the feed-forward layer.
        topk: k; None means the config's.
        balancing: how the experts are kept in balance.
        is_mtp_layer: whether the layer predicts a token further ahead (megatron-core 0.19).

    Raises:
        ValueError: the config asks for what this router does not do.
    """

    is_causal: ClassVar[bool] = True
    """Whether a token's experts depend on no later token; text can be generated only then."""
    uses_expert_bias: ClassVar[bool] = False
    """Whether `select` adds `expert_bias` to the scores that it selects by."""
    lora: Adapter | None
    """What is added to the gate's product."""
    expert_bias: Tensor | None
    """[e] fp32 in any precision of the model, or None; part of the weights, without a gradient."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        aux_loss_coeff: float,
        z_loss_coeff: float,
        router_dtype: torch.dtype | None,
        metrics: RouterMetrics,
        num_experts: int | None = None,
        topk: int | None = None,
        balancing: Balancing | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        if is_mtp_layer:
            raise ValueError(
                "is_mtp_layer is True, but the routers record the layers of the decoder alone"
            )
        if config.calculate_per_token_loss:
            raise ValueError(
                "calculate_per_token_loss is True, but the routers scale their losses per "
                "micro-batch; set it to False"
            )
        super().__init__(config=config)
        self.num_experts: int = config.num_moe_experts if num_experts is None else num_experts
        self.topk: int = config.moe_router_topk if topk is None else topk
        self.lora = None
        self.aux_loss_coeff = aux_loss_coeff
        self.z_loss_coeff = z_loss_coeff
        self.router_dtype = router_dtype
        self.metrics = metrics
        self.layer_number: int | None = None
        self.tp_group = pg_collection.tp
        # The ranks over which the tokens of a micro-batch are split.
        self.token_group = pg_collection.tp_cp if config.sequence_parallel else pg_collection.cp
        self.token_split = TokenSplit(
            context_group=pg_collection.cp,
            sequence_group=pg_collection.tp if config.sequence_parallel else None,
        )
        self.weight = new_parameter(self.num_experts, config.hidden_size, config=config)  # [e, h]
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            config.init_method(self.weight)
        self.balancing = balancing or Balancing()
        self.step = StepCounts(pg_collection.dp)
        if self.balancing.has_bias and not self.uses_expert_bias:
            raise ValueError(
                f"moe_router_enable_expert_bias is True, but {type(self).__name__} selects without"
                " a bias; set it to False, or let `select` add `self.expert_bias` and the class"
                " say so in `uses_expert_bias`"
            )
        has_bias = self.balancing.has_bias
        zeros = torch.zeros(self.num_experts, device=self.weight.device)  # fp32
        self.register_buffer("expert_bias", zeros if has_bias else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the router, and casts all of it but the bias, which moves by less than bf16 has."""
        kept = self.expert_bias
        applied = super()._apply(fn, recurse)
        if kept is not None and self.expert_bias is not None:
            self.expert_bias = kept.to(self.expert_bias.device)
        return applied

    def add_lora(self, lora: LoRA) -> None:
        """Gives the gate an adapter."""
        self.lora = Adapter(
            self.config,
            lora,
            a=(lora.rank, self.config.hidden_size),
            b=(self.num_experts, lora.rank),
            split={},
            tp_group=self.tp_group,
        )

    @abstractmethod
    def select(self, logits: Tensor) -> Routing:
        """Applies the routing rule.

        Args:
            logits: [t, e] of the gate.

        Returns:
            experts [t, k] int64, all different within a token and in any order; their gates
            [t, k]; and scores [t, e], probabilities over all experts, for the load-balancing loss.
        """

    def set_layer_number(self, layer_number: int) -> None:
        """Sets the router's layer; 1 is the model's first, on whatever pipeline stage."""
        self.layer_number = layer_number

    def gating(self, hidden: Tensor) -> Tensor:
        """Computes router logits [t, e] of hidden states [s, b, h]."""
        dtype = self.router_dtype or hidden.dtype
        logits = F.linear(hidden.to(dtype), self.weight.to(dtype))  # [s, b, e]
        if self.lora is not None:
            low = F.linear(hidden.to(dtype), self.lora.a.to(dtype)) * self.lora.scale  # [s, b, r]
            logits = logits + F.linear(low, self.lora.b.to(dtype))
        return logits.reshape(-1, self.num_experts)  # [t, e]

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Routing | DenseRouting:
        """Routes each token.

        While training with gradients the losses ride on `gates`: backward adds their gradient,
        scaled by the pipeline schedule. Evaluation and the first pass of recomputed layers neither
        compute losses nor record metrics.

        Args:
            hidden: [s, b, h] this rank's tokens.
            padding_mask: [s, b] bool, True where no token is, as megatron-core computes with it
                (its documentation has it the other way round); None means tokens everywhere.

        Returns:
            The routing of the t = s * b tokens, each token's experts in ascending order.

        Raises:
            ValueError: the mask is not of these tokens, or `select` returns what is no routing.
        """
        if padding_mask is not None and padding_mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"the padding_mask is {list(padding_mask.shape)}, but must be"
                f" {list(hidden.shape[:2])}: [s, b] of this rank's tokens"
            )
        is_token = None if padding_mask is None else ~padding_mask.flatten()  # [t]
        return self.route(self.gating(hidden), is_token, num_sequences=hidden.shape[1])

    def route(
        self, logits: Tensor, is_token: Tensor | None, *, num_sequences: int
    ) -> Routing | DenseRouting:
        """Selects each token's experts, and attaches the losses; see `forward`.

        Args:
            logits: [t, e].
            is_token: [t] bool, False for padding; None for none.
            num_sequences: b.
        """
        if self.fits_kernels(logits) and fused.takes(fused.setting_of(self.config), logits):
            return self.route_in_kernels(logits, is_token)
        routing = Routing(*self.select(logits))
        self._check_shapes(routing, logits)
        routing = sort_choices(routing)
        is_kept = self._within_capacity(routing, is_token, num_sequences)
        if self.training and torch.is_grad_enabled():
            gates = self._attach_losses(routing, logits, is_token, num_sequences, is_kept)
            routing = routing._replace(gates=gates)
        if is_kept is None:
            return routing
        return DenseRouting(
            *dense_routing(
                routing.experts, routing.gates, num_experts=self.num_experts, is_kept=is_kept
            )
        )

    def _within_capacity(
        self, routing: Routing, is_token: Tensor | None, num_sequences: int
    ) -> Tensor | None:
        """Returns which assignments [t, k] are computed; None for all.

        What runs without training drops nothing: an answer does not depend on its batch.
        """
        factor = self.balancing.capacity_factor
        if factor is None or not self.training:
            return None

        def whole(values: Tensor) -> Tensor:  # [t, ...] to [T, ...]
            by_position = values.unflatten(0, (-1, num_sequences))
            return self.token_split.gather(by_position).flatten(0, 1)

        is_kept = within_capacity(
            whole(routing.experts),
            whole(routing.gates),
            num_experts=self.num_experts,
            factor=factor,
            by_gate=self.balancing.drop_policy == "probs",
            is_token=None if is_token is None else whole(is_token),
        )  # [T, k]
        own = self.token_split.own(is_kept.unflatten(0, (-1, num_sequences)))
        return own.flatten(0, 1)

    def _check_shapes(self, routing: Routing, logits: Tensor) -> None:
        """Refuses what a `select` returns with other shapes, types or indices.

        On a GPU wrong indices end in a device-side assertion: the host does not read them.
        """
        wanted = (logits.shape[0], self.topk)
        found = {
            "experts": (routing.experts, wanted),
            "gates": (routing.gates, wanted),
            "scores": (routing.scores, tuple(logits.shape)),
        }
        for name, (tensor, shape) in found.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{type(self).__name__}.select returned {name} {list(tensor.shape)}, but they"
                    f" must be {list(shape)}: experts and gates [t, k], scores [t, e], with topk"
                    f" {self.topk} of the configuration"
                )
        if routing.experts.dtype != torch.int64:
            raise ValueError(
                f"{type(self).__name__}.select returned experts of {routing.experts.dtype}, but"
                " they are indices of torch.int64; convert them with experts.long()"
            )
        if routing.experts.device.type == "cpu" and routing.experts.numel():
            least, most = (int(bound) for bound in torch.aminmax(routing.experts))
            if least < 0 or most >= self.num_experts:
                raise ValueError(
                    f"{type(self).__name__}.select returned expert {least if least < 0 else most};"
                    f" experts are counted from 0, so indices must be below num_experts"
                    f" ({self.num_experts})"
                )

    def _attach_losses(
        self,
        routing: Routing,
        logits: Tensor,
        is_token: Tensor | None,
        num_sequences: int,
        is_kept: Tensor | None,
    ) -> Tensor:
        """Returns the gates [t, k] as they are, with the gradient of both losses to come.

        Args:
            routing: of all t positions.
            logits: [t, e].
            is_token: [t] bool, False for padding; None for none.
            num_sequences: b.
            is_kept: [t, k] bool, which assignments are computed; None for all.
        """
        group_size = self.token_group.size()
        scores, loss = routing.scores, self.balancing.loss
        assignments = count_assignments(
            routing.experts,
            num_experts=self.num_experts,
            num_sequences=num_sequences,
            is_token=is_token,
            token_group=self.token_group,
            loss=loss,
        )
        if self.balancing.has_bias:
            self.step.add(assignments.counts)
        num_local: int | Tensor = logits.shape[0]
        num_tokens: int | Tensor = num_local * group_size
        if is_token is not None:
            scores = scores.masked_fill(~is_token[:, None], 0.0)
            num_local = is_token.sum()
            # Each token was given k experts; a micro-batch of padding alone has losses of 0.
            num_tokens = (assignments.counts.sum() // self.topk).clamp(min=1)
        balance = balancing_loss(
            loss,
            assignments,
            scores,
            num_tokens=num_tokens,
            topk=self.topk,
            step=self.step,
            layer=self.layer_number,
        )
        z_loss = router_z_loss(logits, num_tokens=num_tokens, is_token=is_token)
        self._record(
            balance=balance,
            z_loss=z_loss,
            scores=scores,
            tokens_per_expert=assignments.local_counts,
            num_local=num_local,
            num_tokens=num_tokens,
            **({} if is_kept is None else _dropped(is_kept, is_token)),
        )
        addend = self.aux_loss_coeff * balance + self.z_loss_coeff * z_loss
        attached: Tensor = MoEAuxLossAutoScaler.apply(routing.gates, addend)
        return attached

    def _record(
        self,
        *,
        balance: Tensor,
        z_loss: Tensor,
        scores: Tensor,
        tokens_per_expert: Tensor,
        num_local: int | Tensor,
        num_tokens: int | Tensor,
        **varying: Tensor,
    ) -> None:
        """Records a micro-batch.

        Args:
            balance: [] this rank's addend of the load-balancing loss.
            z_loss: [] that of the z-loss.
            scores: [t, e]; 0 for padding.
            tokens_per_expert: [e] assignments of this rank's tokens.
            num_local: tokens of this rank.
            num_tokens: tokens of the micro-batch.
            varying: what `RouterMetrics.record` takes about unequal numbers of experts.
        """
        self.metrics.record(
            self.known_layer(),
            load_balancing=balance.detach(),
            z_sum=z_loss.detach() * num_tokens,
            entropy_sum=routing_entropy(scores.detach()).sum(),
            tokens_per_expert=tokens_per_expert,
            num_tokens=num_local,
            group_size=self.token_group.size(),
            **varying,
        )


def _dropped(is_kept: Tensor, is_token: Tensor | None) -> dict[str, Tensor]:
    """Counts the assignments that are dropped, and the tokens that none is left of."""
    lost, unrouted = ~is_kept, ~is_kept.any(dim=1)  # [t, k], [t]
    if is_token is not None:
        lost, unrouted = lost & is_token[:, None], unrouted & is_token
    return {"dropped": lost.sum(), "unrouted": unrouted.sum()}
