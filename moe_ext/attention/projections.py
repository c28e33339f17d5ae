"""Holds the weights of a mixture of attention heads, split over tensor parallel ranks by head."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from moe_ext.experts.interface import ExpertBackend
from moe_ext.experts.slots import ExpertOrder
from moe_ext.layers.lora import Adapter, LoRA
from moe_ext.layers.parameters import new_parameter
from moe_ext.layers.products import accumulating_linear

# Where the heads are in each weight of one layer.
_HEAD_AXES = {"weight": 0, "weight_q": 1, "weight_o": 2}


class _HeadParallel(MegatronModule):
    """Splits all its parameters by head, on the axis that `_HEAD_AXES` says."""

    def __init__(self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp

    def _mark_and_initialize(self) -> None:
        for name, weight in self.named_parameters(recurse=False):
            set_tensor_model_parallel_attributes(weight, True, _HEAD_AXES[name], 1)
            if self.config.perform_initialization:
                is_output = name == "weight_o"
                with get_cuda_rng_tracker().fork():
                    if is_output:
                        self.config.output_layer_init_method(weight)
                    else:
                        self.config.init_method(weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describes each parameter, split over tensor parallel ranks by head, and adapters."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        parameters = dict(self.named_parameters(recurse=False))
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            parameters,
            prefix,
            {name: _HEAD_AXES[name] for name in parameters},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, adapter in self.named_children():
            own = f"{prefix}{name}."
            sharded |= adapter.sharded_state_dict(own, sharded_offsets, metadata)
        return sharded


class KeyValueProjection(_HeadParallel):
    """Projects to keys and values, which all experts share.

    The weight is [2 ng hn, h], each head's key before its value.

    Args:
        config: megatron-core's.
        num_groups: key/value heads on this rank (ng).
        pg_collection: this rank's groups; tp is used.
    """

    lora: Adapter | None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_groups: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.lora = None
        self.num_groups = num_groups
        width = 2 * num_groups * config.kv_channels
        self.weight = new_parameter(width, config.hidden_size, config=config)
        self._mark_and_initialize()

    def add_lora(self, lora: LoRA) -> None:
        """Gives the weight an adapter."""
        rows, columns = self.weight.shape
        a, b = (lora.rank, columns), (rows, lora.rank)
        self.lora = Adapter(self.config, lora, a=a, b=b, split={"b": 0}, tp_group=self.tp_group)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Computes key and value [s, b, ng, hn] of this rank's heads from [s, b, h]."""
        both = accumulating_linear(hidden, self.weight)  # [s, b, 2 ng hn]
        if self.lora is not None:
            low = accumulating_linear(hidden, self.lora.whole(self.lora.a)) * self.lora.scale
            both = both + accumulating_linear(low, self.lora.b)
        key, value = both.unflatten(2, (self.num_groups, -1)).chunk(2, dim=-1)
        return key, value


class AttentionExperts(_HeadParallel):
    """Holds each expert's projections: weight_q [e, ng hn, h] and weight_o [e, h, ng hn].

    Every rank of the expert parallel group holds all of them, so their gradients are reduced like
    those of dense weights.

    Args:
        config: megatron-core's.
        num_experts: e.
        num_groups: key/value heads on this rank (ng); an expert has one query head for each.
        backend: what multiplies; it must have a projection.
        pg_collection: this rank's groups; tp is used.
    """

    lora_q: Adapter | None
    lora_o: Adapter | None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_experts: int,
        num_groups: int,
        backend: ExpertBackend,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.lora_q = self.lora_o = None
        self.backend = backend
        width = num_groups * config.kv_channels
        self.weight_q = new_parameter(num_experts, width, config.hidden_size, config=config)
        self.weight_o = new_parameter(num_experts, config.hidden_size, width, config=config)
        self._mark_and_initialize()

    def forward(self, operand: Tensor, order: ExpertOrder, *, is_output: bool) -> Tensor:
        """Projects tokens to queries, or what queries found to outputs.

        Args:
            operand: tokens [t, h]; for the output rows [t * k, ng * hn] by token and slot.
            order: of the t * k rows.
            is_output: whether weight_o is meant, not weight_q.

        Returns:
            Queries [t * k, ng * hn] by token and slot; or [t, h], this rank's heads' addend of the
            output, summed over the slots.
        """
        backend = self.backend
        if is_output:
            output = backend.project_and_combine(operand, self.weight_o, order)
            if (lora := self.lora_o) is not None:
                low = backend.project_rows(operand, lora.a, order) * lora.scale  # [t * k, r]
                output = output + backend.project_and_combine(low, lora.whole(lora.b), order)
            return output
        queries = backend.project_slots(operand, self.weight_q, order)
        if (lora := self.lora_q) is not None:
            low = backend.project_slots(operand, lora.whole(lora.a), order) * lora.scale
            queries = queries + backend.project_rows(low, lora.b, order)
        return queries

    def add_lora(self, lora: LoRA) -> None:
        """Gives both weights adapters."""
        number, width, hidden = self.weight_q.shape
        self.lora_q = Adapter(
            self.config,
            lora,
            a=(number, lora.rank, hidden),
            b=(number, width, lora.rank),
            split={"b": 1},
            tp_group=self.tp_group,
        )
        self.lora_o = Adapter(
            self.config,
            lora,
            a=(number, lora.rank, width),
            b=(number, hidden, lora.rank),
            split={"a": 2},
            tp_group=self.tp_group,
        )
