"""megatron-core's layer of experts, and the short way where no token leaves its rank."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.experts.mlp import ExpertMLP
from moe_ext.experts.slots import sort_by_expert
from moe_ext.functional import selected_experts
from moe_ext.layers.parameters import new_parameter


class ExpertsLayer(MoELayer):
    """Router, dispatch, experts.

    Where a rank holds all experts whole (EP 1, ETP 1) there is nothing to dispatch: tokens are
    handed to the experts as they lie, with the order of their rows, and nothing is copied to the
    host. Elsewhere megatron-core's dispatcher sends them.

    Args:
        config: megatron-core's.
        submodules: experts (`ExpertMLP`) and router.
        pg_collection: this rank's groups.
        has_output_bias: add one bias [h], that no gate multiplies, to what a token's experts add
            up to (JetMoE).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        has_output_bias: bool = False,
    ) -> None:
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection)
        self.is_local = pg_collection.ep.size() * pg_collection.expt_tp.size() == 1
        self.output_bias: nn.Parameter | None = None
        if has_output_bias:
            self.output_bias = new_parameter(config.hidden_size, config=config)
            # Each rank adds it to its part of the sequence: megatron-core sums the gradients.
            self.output_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            nn.init.zeros_(self.output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Send each token to its experts and add up what they make of it.

        Args:
            hidden_states: [s, b, h] this rank's tokens.
            intermediate_tensors: megatron-core's, for a layer cut in two by CUDA graphs; None.
            padding_mask: handed to the router.

        Returns:
            [s, b, h]; and None, for there is no bias left to add.
        """
        if not self.is_local or intermediate_tensors is not None:
            output, _ = super().forward(hidden_states, intermediate_tensors, padding_mask)
        elif self.moe_layer_recompute and self.training:
            output = checkpoint(self._compute_local, False, hidden_states, padding_mask)
        else:
            output = self._compute_local(hidden_states, padding_mask)
        return (output if self.output_bias is None else output + self.output_bias), None

    def _compute_local(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """[s, b, h] to [s, b, h], all experts being here."""
        experts: ExpertMLP = self.experts
        probs, routing_map = self.route(hidden, padding_mask)  # [t, e]
        chosen, gates = selected_experts(probs, routing_map, topk=self.config.moe_router_topk)
        order = sort_by_expert(chosen, num_experts=self.num_local_experts)
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [t, h]
        return experts.compute_routed(tokens, order, gates).view_as(hidden)
