"""Adds products of low rank to frozen weights: LoRA (Hu et al., arXiv 2106.09685).

A layer computes W x + (alpha / r) B (A x), never W + (alpha / r) B A: see docs/decisions/0012.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from moe_ext.layers.parameters import new_parameter
from moe_ext.layers.products import accumulating_linear

LORA_PREFIX = "lora"
"""What the name of every adapter in its layer begins with."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Says which matrices get products of low rank, and of which."""

    rank: int
    """Of the products (r)."""
    alpha: float
    """The products are multiplied by alpha / rank."""
    targets: tuple[str, ...]
    """Groups of weights, of `TARGETS`."""

    @property
    def scale(self) -> float:
        """Return what the products are multiplied by."""
        return self.alpha / self.rank


TARGETS = ("attention", "experts", "router")
"""Groups of `parameter_groups` that can have adapters."""


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name is part of an adapter."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-2].startswith(LORA_PREFIX)


class Adapter(MegatronModule):
    """Holds A [..., r, in] and B [..., out, r] beside a weight [..., out, in].

    The matrix whose axis the weight splits over tensor parallel ranks is split with it, on the same
    axis; the other is whole on every rank. Under sequence parallelism its gradient on a rank is an
    addend, which megatron-core sums because it is marked `sequence_parallel`.

    Args:
        config: megatron-core's.
        lora: rank and scale.
        a: shape of A on this rank.
        b: shape of B on this rank.
        split: name and axis of the matrix that is split; empty for none.
        tp_group: the ranks that share the weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoRA,
        *,
        a: tuple[int, ...],
        b: tuple[int, ...],
        split: Mapping[str, int],
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.scale = lora.scale
        self.tp_group = tp_group
        self._split = dict(split)
        self.a = new_parameter(*a, config=config)
        self.b = new_parameter(*b, config=config)
        for name, weight in self.named_parameters():
            if name in split:
                set_tensor_model_parallel_attributes(weight, True, split[name], 1)
            else:
                weight.sequence_parallel = config.sequence_parallel
        torch.nn.init.zeros_(self.b)

    def whole(self, weight: Tensor) -> Tensor:
        """Returns a whole matrix for products whose gradients are addends on each rank.

        Under sequence parallelism megatron-core sums them at the end of a step, else backward does.
        """
        if self.config.sequence_parallel or self.tp_group.size() == 1:
            return weight
        copied: Tensor = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return copied

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Describes both matrices, the split one by its axis."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded: dict[str, ShardedTensor] = make_sharded_tensors_for_checkpoint(
            dict(self.named_parameters()),
            prefix,
            self._split,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


class ColumnAdapter(Adapter):
    """Adapts a matrix [out, h] whose rows are split over tensor parallel ranks.

    A matrix that stacks several projections, group of heads by group of heads, has an A for each,
    as if it were several matrices.

    Args:
        config: megatron-core's.
        lora: rank and scale.
        rows: of the weight on this rank.
        parts: rows of each projection in one group of heads; one number for a matrix by itself.
        tp_group: the ranks that share the weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoRA,
        *,
        rows: int,
        parts: tuple[int, ...],
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        self.parts = parts
        super().__init__(
            config,
            lora,
            a=(len(parts), lora.rank, config.hidden_size),
            b=(rows, lora.rank),
            split={"b": 0},
            tp_group=tp_group,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes [s, b, rows] of [s, b, h], this rank's part of s under sequence parallelism."""
        low = accumulating_linear(hidden, self.a.flatten(0, 1)) * self.scale  # [s, b, parts * r]
        if self.tp_group.size() > 1:
            # Backward sums the gradients that the ranks' rows give to the same tokens.
            if self.config.sequence_parallel:
                low = gather_from_sequence_parallel_region(low, group=self.tp_group)
            else:
                low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        if len(self.parts) == 1:
            return accumulating_linear(low, self.b)
        groups = self.b.unflatten(0, (-1, sum(self.parts)))  # [groups, rows of a group, r]
        outputs = [
            accumulating_linear(part, rows.flatten(0, 1)).unflatten(2, (-1, rows.shape[1]))
            for part, rows in zip(
                low.chunk(len(self.parts), dim=-1), groups.split(self.parts, dim=1), strict=True
            )
        ]  # [s, b, groups, rows of the part]
        return torch.cat(outputs, dim=3).flatten(2)  # [s, b, rows]


class RowAdapter(Adapter):
    """Adapts a matrix [h, in] whose columns are split over tensor parallel ranks.

    Args:
        config: megatron-core's.
        lora: rank and scale.
        columns: of the weight on this rank.
        tp_group: the ranks that share the weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoRA,
        *,
        columns: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            config,
            lora,
            a=(lora.rank, columns),
            b=(config.hidden_size, lora.rank),
            split={"a": 1},
            tp_group=tp_group,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes [s, b, h], summed over the ranks, of this rank's columns [s, b, in]."""
        low = accumulating_linear(hidden, self.a) * self.scale  # [s, b, r], an addend
        if self.tp_group.size() > 1:
            if self.config.sequence_parallel:
                low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
            else:
                low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return accumulating_linear(low, self.b)
