"""Adapts the matrices of experts: an A and a B of low rank for each."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_ext.experts.gate import GatedActivation
from moe_ext.experts.interface import ExpertBackend, ProjectionFunction
from moe_ext.layers.lora import LoRA
from moe_ext.layers.parameters import new_parameter


class ExpertAdapter(MegatronModule):
    """Holds A [el, r, in] and B [el, ..., out, r] beside this rank's stacked matrices.

    Experts are split like the matrices: over the expert parallel group and, where they are, over
    the expert tensor parallel group. There a matrix that is not split is whole on every rank;
    backward sums its gradient, and one rank counts it in the norm.

    Args:
        config: megatron-core's.
        lora: rank and scale.
        a: shape of A on this rank.
        b: shape of B on this rank.
        split: name and axis of the matrix that is split over expert tensor parallel ranks.
        pg_collection: this rank's groups; ep, expt_tp and expt_dp are used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoRA,
        *,
        a: tuple[int, ...],
        b: tuple[int, ...],
        split: tuple[str, int],
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.scale = lora.scale
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self._split = split
        self.a = new_parameter(*a, config=config)
        self.b = new_parameter(*b, config=config)
        nn.init.zeros_(self.b)
        for name, weight in self.named_parameters():
            # As the experts' own weights, see `mlp.mark_expert_weight`.
            weight.allreduce = False
            set_tensor_model_parallel_attributes(weight, True, split[1], 1)
            if name != split[0]:
                weight.shared = self.tp_group.rank() > 0

    def forward(self, rows: Tensor, sizes: Tensor, project: ProjectionFunction) -> Tensor:
        """Computes B A x times the scale for rows sorted by expert.

        Args:
            rows: [t, in].
            sizes: [el] rows of each expert.
            project: multiplies each expert's rows by its matrix.

        Returns:
            [t, out].
        """
        low = project(rows, self._whole("a"), sizes) * self.scale  # [t, r]
        second = self._whole("b")
        if second.dim() > 3:
            second = second.flatten(1, -2)  # [el, out, r]
        return project(low, second, sizes)

    def _whole(self, name: str) -> Tensor:
        """Returns a matrix; the gradient of one that is not split is summed over its ranks."""
        weight: Tensor = getattr(self, name)
        if name == self._split[0] or self.tp_group.size() == 1:
            return weight
        copied: Tensor = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return copied

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Describes both matrices as parts of those of all experts."""
        axes = len(sharded_offsets)
        found = {}
        for name, weight in self.named_parameters():
            key, offsets = f"{prefix}{name}", [(axes, self.ep_group.rank(), self.ep_group.size())]
            copy = 0 if name == self._split[0] else self.tp_group.rank()
            if name == self._split[0]:
                place = (axes + self._split[1], self.tp_group.rank(), self.tp_group.size())
                offsets.append(place)
            found[key] = ShardedTensor.from_rank_offsets(
                key,
                weight,
                *sharded_offsets,
                *offsets,
                replica_id=(0, copy, self.dp_group.rank()),
                prepend_axis_num=axes,
            )
        return found


def adapted_experts(
    rows: Tensor,
    weights: tuple[Tensor, Tensor],
    adapters: tuple[ExpertAdapter, ExpertAdapter],
    sizes: Tensor,
    probs: Tensor,
    *,
    backend: ExpertBackend,
) -> Tensor:
    """Computes SwiGLU experts with adapters over sorted rows; `loop_experts` has the contract.

    Args:
        rows: [t, h].
        weights: [el, 2, f, h] and [el, h, f].
        adapters: of both.
        sizes: [el] rows of each expert.
        probs: [t].
        backend: with a projection.

    Returns:
        [t, h].
    """
    project = backend.projection
    assert project is not None  # `choose_backend` saw to it
    first, second = adapters
    projected = project(rows, weights[0].flatten(1, 2), sizes) + first(rows, sizes, project)
    product: Tensor = GatedActivation.apply(projected, probs)  # [t, f]
    return project(product, weights[1], sizes) + second(product, sizes, project)


def add_expert_lora(
    config: TransformerConfig,
    lora: LoRA,
    weights: tuple[torch.Tensor, torch.Tensor],
    *,
    pg_collection: ProcessGroupCollection,
) -> tuple[ExpertAdapter, ExpertAdapter]:
    """Makes the adapters of weights [el, 2, f, h] and [el, h, f]."""
    number, _, ffn, width = weights[0].shape
    rank = lora.rank
    return (
        ExpertAdapter(
            config,
            lora,
            a=(number, rank, width),
            b=(number, 2, ffn, rank),
            split=("b", 2),
            pg_collection=pg_collection,
        ),
        ExpertAdapter(
            config,
            lora,
            a=(number, rank, ffn),
            b=(number, width, rank),
            split=("a", 2),
            pg_collection=pg_collection,
        ),
    )
