"""Defines this rank's experts: parameters, parallel layout and checkpoint layout."""

import contextlib
from typing import Any

import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.experts.expert_adapter import ExpertAdapter, adapted_experts, add_expert_lora
from moe_ext.experts.interface import ExpertBackend
from moe_ext.experts.pairs import Pairs, rows_of, sum_rows
from moe_ext.experts.slots import ExpertOrder, permute_tokens, sort_rows, unpermute_tokens
from moe_ext.layers.lora import LoRA
from moe_ext.layers.parameters import new_parameter

# The f dimension of weight1 [el, 2, f, h] and of weight2 [el, h, f].
_FFN_AXIS = 2


class ExpertMLP(MegatronModule):
    """Holds SwiGLU experts, stacked: weight1 [el, 2, f, h] (gate, then up) and weight2 [el, h, f].

    Experts are split over the expert parallel group, and f over the expert tensor parallel group,
    where the output is a partial sum that megatron-core's token dispatcher completes.

    Both weights are always marked `allreduce=False` (reduce over the expert data parallel group)
    and `tensor_model_parallel=True` (count in the gradient norm on every rank): see
    `mark_expert_weight`.

    Args:
        num_local_experts: experts on this rank (el).
        config: megatron-core's; moe_ffn_hidden_size is the width of a whole expert.
        pg_collection: this rank's groups; ep, expt_tp and expt_dp are used.
        backend: what computes them.
        name: where in the model, as megatron-core 0.19 says; not needed.

    Raises:
        ValueError: the config describes other experts than these.
    """

    lora1: ExpertAdapter | None
    lora2: ExpertAdapter | None

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        backend: ExpertBackend,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        del name
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.backend = backend
        self._groups = pg_collection
        self.lora1 = self.lora2 = None
        ffn = _local_ffn_size(config, self.tp_group.size())
        width = config.hidden_size
        self.weight1 = new_parameter(num_local_experts, 2, ffn, width, config=config)
        self.weight2 = new_parameter(num_local_experts, width, ffn, config=config)
        for weight in (self.weight1, self.weight2):
            mark_expert_weight(weight)
        if config.perform_initialization:
            with _expert_rng():
                config.init_method(self.weight1)
                config.output_layer_init_method(self.weight2)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Applies each expert to its tokens and weights the result by the router.

        Args:
            permuted_local_hidden_states: [t, h] dispatched tokens, sorted by expert.
            tokens_per_expert: [el] how many tokens each local expert received.
            permuted_probs: [t] router weights.

        Returns:
            [t, h] of the hidden states' dtype, a partial sum under expert tensor parallelism; and
            None, for there is no bias.
        """
        if self.lora1 is not None:
            return self._adapted(
                permuted_local_hidden_states, tokens_per_expert, permuted_probs
            ), None
        output = self.backend.experts(
            permuted_local_hidden_states,
            self.weight1,
            self.weight2,
            tokens_per_expert,
            permuted_probs,
        )
        return output, None

    def compute_routed(self, tokens: Tensor, order: ExpertOrder, gates: Tensor) -> Tensor:
        """Sends tokens to their experts and sums the results; all experts are on this rank.

        Args:
            tokens: [t, h].
            order: of the rows that the experts get.
            gates: [t, k] router weights.

        Returns:
            [t, h].
        """
        if self.lora1 is not None:
            probs = sort_rows(gates.flatten(), order)
            rows = self._adapted(permute_tokens(tokens, order), order.tokens_per_expert, probs)
            return unpermute_tokens(rows, order)
        return self.backend.routed_experts(tokens, self.weight1, self.weight2, order, gates)

    def compute_pairs(self, tokens: Tensor, pairs: Pairs) -> Tensor:
        """Sends tokens to unequal numbers of experts and sums; all experts are on this rank.

        Args:
            tokens: [t, h].
            pairs: of tokens and experts.

        Returns:
            [t, h]; 0 for a token without an expert.
        """
        rows, _ = self(rows_of(tokens, pairs), pairs.tokens_per_expert, pairs.gates)
        return sum_rows(rows, pairs)

    def add_lora(self, lora: LoRA) -> None:
        """Gives both weights adapters."""
        weights = (self.weight1, self.weight2)
        self.lora1, self.lora2 = add_expert_lora(
            self.config, lora, weights, pg_collection=self._groups
        )

    def _adapted(self, rows: Tensor, sizes: Tensor, probs: Tensor) -> Tensor:
        """Computes experts with adapters over sorted rows [t, h]."""
        assert self.lora1 is not None and self.lora2 is not None
        return adapted_experts(
            rows,
            (self.weight1, self.weight2),
            (self.lora1, self.lora2),
            sizes,
            probs,
            backend=self.backend,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Describes both weights as parts of [e, 2, f, h] and [e, h, f], and their adapters.

        A checkpoint can be loaded under any other expert and expert tensor parallel size.

        Args:
            prefix: of the keys.
            sharded_offsets: dimensions put in front, such as the layer number.
            metadata: not needed.
        """
        axes = len(sharded_offsets)
        adapters = {
            name: value
            for lora in ("lora1", "lora2")
            if getattr(self, lora) is not None
            for name, value in getattr(self, lora)
            .sharded_state_dict(f"{prefix}{lora}.", sharded_offsets, metadata)
            .items()
        }
        return adapters | {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                (axes, self.ep_group.rank(), self.ep_group.size()),
                (axes + _FFN_AXIS, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=axes,
            )
            for name, weight in (("weight1", self.weight1), ("weight2", self.weight2))
        }


def _local_ffn_size(config: TransformerConfig, tensor_parallel_size: int) -> int:
    """Computes the width of an expert on this rank; refuses a config of other experts."""
    if config.add_bias_linear:
        raise ValueError("add_bias_linear is True, but the experts have no biases; set it to False")
    if not config.gated_linear_unit or config.activation_func is not F.silu:
        raise ValueError(
            f"the experts are SwiGLU, but gated_linear_unit is {config.gated_linear_unit} and "
            f"activation_func is {config.activation_func}; set True and torch.nn.functional.silu"
        )
    whole = config.moe_ffn_hidden_size
    if whole % tensor_parallel_size:
        raise ValueError(
            f"moe_ffn_hidden_size ({whole}) must be a multiple of the expert tensor parallel size "
            f"({tensor_parallel_size})"
        )
    return whole // tensor_parallel_size


def mark_expert_weight(weight: nn.Parameter) -> None:
    """Tells megatron-core how to reduce and how to count the gradient of an expert's weight.

    * allreduce=False: reduce over the expert data parallel group. megatron-core's own experts say
      so only when expert parallelism is on; without it they are reduced over the plain data
      parallel group, which leaves copies on different tensor parallel ranks unsynchronised when
      the expert tensor parallel size is smaller. The expert group is right in both cases, and the
      optimizer keeps one arrangement of its state whatever the expert parallel size.
    * tensor_model_parallel=True: no tensor parallel rank holds a duplicate within the group over
      which the optimizer sums the norm (expert tensor x expert x pipeline parallel, or disjoint
      shards in the distributed optimizer), so each rank counts what it holds.
    """
    weight.allreduce = False  # type: ignore[attr-defined]
    set_tensor_model_parallel_attributes(weight, True, _FFN_AXIS, 1)


def _expert_rng() -> contextlib.AbstractContextManager[None]:
    """Enters the random stream in which expert parallel ranks differ, if there is one."""
    tracker = get_cuda_rng_tracker()
    name = get_expert_parallel_rng_tracker_name()
    if name in tracker.get_states():
        fork: contextlib.AbstractContextManager[None] = tracker.fork(name)
        return fork
    return contextlib.nullcontext()
