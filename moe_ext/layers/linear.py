"""Runs megatron-core's parallel linear layers on `accumulating_linear` where no rank waits.

megatron-core adds a weight gradient to its buffer in one pass only with a CUDA extension of Apex.
"""

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

from moe_ext.layers.lora import LORA_PREFIX, ColumnAdapter, LoRA, RowAdapter
from moe_ext.layers.products import accumulating_linear

Sharded = dict[str, Any]


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """Splits rows of the weight over tensor parallel ranks."""

    lora: ColumnAdapter | None
    """What is added to the weight's product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = None

    def add_lora(self, lora: LoRA, *, parts: tuple[int, ...]) -> None:
        """Gives the weight an adapter; `parts` are `ColumnAdapter`'s."""
        rows = self.output_size_per_partition
        self.lora = ColumnAdapter(self.config, lora, rows=rows, parts=parts, tp_group=self.tp_group)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Computes megatron-core's output, and the adapter's."""
        output, bias = super().forward(input_, *args, **kwargs)
        return (output if self.lora is None else output + self.lora(input_)), bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Under tensor parallelism megatron-core's own overlaps its collectives with the products.
        if kwargs["sequence_parallel"] or kwargs["allreduce_dgrad"] or kwargs["bias"] is not None:
            output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return output
        return accumulating_linear(input, weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Sharded:
        """Describes the weight and its adapter."""
        state: Sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter(state, self.lora, prefix, sharded_offsets, metadata)


class RowParallelLinear(layers.RowParallelLinear):
    """Splits columns of the weight over tensor parallel ranks."""

    lora: RowAdapter | None
    """What is added to the weight's product."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = None

    def add_lora(self, lora: LoRA) -> None:
        """Gives the weight an adapter."""
        columns = self.input_size_per_partition
        self.lora = RowAdapter(self.config, lora, columns=columns, tp_group=self.tp_group)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes megatron-core's output, and the adapter's."""
        output, bias = super().forward(input_)
        return (output if self.lora is None else output + self.lora(input_)), bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return accumulating_linear(input, weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Sharded:
        """Describes the weight and its adapter."""
        state: Sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter(state, self.lora, prefix, sharded_offsets, metadata)


def _with_adapter(
    state: Sharded,
    adapter: ColumnAdapter | RowAdapter | None,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> Sharded:
    """Replaces what megatron-core says of an adapter, which it takes for whole on every rank."""
    if adapter is None:
        return state
    own = f"{prefix}{LORA_PREFIX}."
    kept = {name: value for name, value in state.items() if not name.startswith(own)}
    return kept | adapter.sharded_state_dict(own, sharded_offsets, metadata)
