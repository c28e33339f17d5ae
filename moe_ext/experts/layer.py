"""megatron-core's layer of experts with one bias for all of them."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.parameters import new_parameter


class OutputBiasMoELayer(MoELayer):
    """Adds one bias [h], that no gate multiplies, to what a token's experts add up to (JetMoE).

    Args:
        config: megatron-core's.
        submodules: experts and router.
        pg_collection: this rank's groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, submodules=submodules, pg_collection=pg_collection)
        self.output_bias = new_parameter(config.hidden_size, config=config)
        # Each rank adds it to its part of the sequence: megatron-core sums the parts' gradients.
        self.output_bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        nn.init.zeros_(self.output_bias)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Add the bias to the combined output, [s, b, h] of this rank's tokens."""
        combined: Tensor = super().postprocess(output, shared_expert_output)
        return combined + self.output_bias
