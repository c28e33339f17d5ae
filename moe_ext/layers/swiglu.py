"""Builds dense SwiGLU feed-forward layers of megatron-core in any width."""

from copy import copy
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.kernels import fused
from moe_ext.layers.linear import ColumnParallelLinear, RowParallelLinear

MATRICES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
"""Gate and up projections in one matrix, and the down projection."""


class DenseMLP(MLP):
    """Computes a SwiGLU layer of the width that it is given.

    megatron-core takes the width of its second matrix from the config, which in a model with
    experts has theirs.

    Args:
        config: shared by all layers.
        submodules: `MATRICES`.
        ffn_hidden_size: width of the layer, over all tensor parallel ranks.
        pg_collection: this rank's groups; tp is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        ffn_hidden_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        if config.ffn_hidden_size != ffn_hidden_size:
            config = copy(config)
            config.ffn_hidden_size = ffn_hidden_size
        super().__init__(
            config=config,
            submodules=submodules,
            ffn_hidden_size=ffn_hidden_size,
            tp_group=pg_collection.tp,
        )
        self.fused_kernels = fused.setting_of(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes megatron-core's output and bias, the activation in a kernel if one takes it."""
        is_scaled = bool(args) or kwargs.get("per_token_scale") is not None
        if is_scaled or not fused.takes(self.fused_kernels, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        from moe_ext.kernels.gated_unit import gated_unit

        projected, _ = self.linear_fc1(hidden_states)  # [s, b, 2f]
        return self.linear_fc2(gated_unit(projected))


class SharedExperts(DenseMLP):
    """Computes what every token gets beside the experts that it is routed to."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes [s, b, h] of [s, b, h], this rank's part of s under sequence parallelism."""
        output: Tensor
        output, _ = super().forward(hidden_states, *args, **kwargs)
        return output
