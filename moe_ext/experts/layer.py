"""Defines the layer of experts: local where no token leaves its rank, else megatron-core's."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.experts.mlp import ExpertMLP
from moe_ext.experts.pairs import pair_up
from moe_ext.experts.slots import sort_by_expert
from moe_ext.functional import Routing, dense_routing
from moe_ext.kernels import fused
from moe_ext.layers.parameters import new_parameter, parameter_device_type
from moe_ext.layers.swiglu import MATRICES, SharedExperts
from moe_ext.unequal import DenseRouting


class ExpertsLayer(MoELayer):
    """Routes tokens, sends them to their experts and sums what comes back.

    Where a rank holds all experts whole (EP 1, ETP 1) there is nothing to dispatch: the experts
    read tokens where they are, through the order of their rows, and nothing is copied to the host.
    Elsewhere megatron-core's dispatcher permutes and sends them; for it alone the routing is
    written as dense [t, e] tensors.

    Args:
        config: megatron-core's.
        submodules: experts (`ExpertMLP`) and router.
        pg_collection: this rank's groups.
        has_output_bias: add one bias [h], that no gate multiplies, to what a token's experts add
            up to (JetMoE).
        shared_width: width of an expert that every token has, ungated, beside the others; None for
            none.

    Raises:
        ValueError: tokens should be sent by DeepEP, which is not installed or has no GPU.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        pg_collection: ProcessGroupCollection,
        has_output_bias: bool = False,
        shared_width: int | None = None,
    ) -> None:
        if config.moe_token_dispatcher_type == "flex":
            _check_deepep(parameter_device_type(config))
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection)
        if shared_width is not None:  # megatron-core's forward then adds them too
            self.use_shared_expert = True
            self.shared_experts = SharedExperts(
                config, MATRICES, ffn_hidden_size=shared_width, pg_collection=pg_collection
            )
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
        """Sends each token to its experts and sums their outputs.

        Args:
            hidden_states: [s, b, h] this rank's tokens.
            intermediate_tensors: megatron-core's, for a layer cut in two by CUDA graphs; None.
            padding_mask: [b, s] bool, True where no token is; handed to the router as [s, b].

        Returns:
            [s, b, h]; and None, for there is no bias left to add.
        """
        if not self.is_local or intermediate_tensors is not None:
            output, _ = super().forward(hidden_states, intermediate_tensors, padding_mask)
        else:
            padding = None if padding_mask is None else padding_mask.T
            if self.moe_layer_recompute and self.training:
                output = checkpoint(self._compute_local, False, hidden_states, padding)
            else:
                output = self._compute_local(hidden_states, padding)
        return (output if self.output_bias is None else output + self.output_bias), None

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Routes tokens as megatron-core's dispatchers want it.

        Args:
            hidden_states: [s, b, h] this rank's tokens.
            padding_mask: [s, b], handed to the router.

        Returns:
            probs [t, e], zero off the selection, and routing_map [t, e] bool.
        """
        routing: Routing | DenseRouting = self.router(hidden_states, padding_mask)
        if isinstance(routing, DenseRouting):
            return routing.gates, routing.is_chosen
        return dense_routing(
            routing.experts, routing.gates, num_experts=self.config.num_moe_experts
        )

    def _compute_local(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Computes [s, b, h] of [s, b, h] where all experts are on this rank."""
        experts: ExpertMLP = self.experts
        routing: Routing | DenseRouting = self.router(hidden, padding_mask)
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [t, h]
        if isinstance(routing, DenseRouting):
            output = experts.compute_pairs(tokens, pair_up(routing))
        else:
            order = sort_by_expert(
                routing.experts,
                num_experts=self.num_local_experts,
                in_kernels=fused.takes(fused.setting_of(self.config), routing.gates),
            )
            output = experts.compute_routed(tokens, order, routing.gates)
        output = output.view_as(hidden)
        shared: Tensor | None = self.shared_experts_compute(hidden)
        return output if shared is None else output + shared


def _check_deepep(device_type: str) -> None:
    """Refuses the flexible dispatcher where its kernels are missing or have no GPU."""
    if token_dispatcher.fused_dispatch is None:
        raise ValueError(
            "moe_token_dispatcher_type is 'flex', which needs the package deep_ep, and it cannot be"
            " imported; build it on the GPU machine (https://github.com/deepseek-ai/DeepEP), or use"
            " alltoall"
        )
    if fused_a2a.HAVE_DEEP_EP and device_type != "cuda":
        raise ValueError(
            f"moe_token_dispatcher_type is 'flex', whose kernels send between GPUs, but the device"
            f" is '{device_type}'; use alltoall"
        )


class SharedByLayers(MoELayer):
    """Computes one layer's feed-forward with weights that other layers have too.

    Args:
        config: megatron-core's.
        submodules: not needed.
        shared: what all these layers compute; the model has it as a part, this layer does not.
    """

    def __init__(
        self, config: TransformerConfig, submodules: None = None, *, shared: ExpertsLayer
    ) -> None:
        del submodules
        MegatronModule.__init__(self, config=config)
        self._shared = (shared,)  # in a tuple, or its weights would be this layer's
        self.layer_number: int | None = None
        self._recomputes = (
            config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Sets the layer under which the router records; 1 is the model's first."""
        self.layer_number = layer_number

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Computes what `ExpertsLayer.forward` does; see there."""
        if self._recomputes and self.training:
            return checkpoint(self._compute, False, hidden_states, padding_mask), None
        return self._compute(hidden_states, padding_mask), None

    def _compute(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Computes [s, b, h] of [s, b, h], in backward again if that recomputes."""
        (layer,) = self._shared
        layer.set_layer_number(self.layer_number)
        output: Tensor
        output, _ = layer(hidden, None, padding_mask)
        return output
