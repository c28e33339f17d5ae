"""Runs megatron-core's parallel linear layers on `accumulating_linear` where no rank waits.

megatron-core adds a weight gradient to its buffer in one pass only with a CUDA extension of Apex.
"""

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from moe_ext.layers.lora import LORA_PREFIX, ColumnAdapter, LoRA, RowAdapter
from moe_ext.layers.products import accumulating_linear


class _WithAdapter(nn.Module):
    """Adds an adapter to a parallel linear layer, which comes after it among the bases."""

    lora: ColumnAdapter | RowAdapter | None
    """What is added to the weight's product."""
    tp_group: Any
    """megatron-core's: ranks that share the weight."""
    output_size_per_partition: int
    """megatron-core's: rows here, where rows are split."""
    input_size_per_partition: int
    """megatron-core's: columns here, where columns are split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Computes megatron-core's output, and the adapter's."""
        output, bias = super().forward(input_, *args, **kwargs)
        return (output if self.lora is None else output + self.lora(input_)), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describes the weight, and its adapter, of which megatron-core takes any for whole."""
        state: dict[str, Any] = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        if self.lora is None:
            return state
        own = f"{prefix}{LORA_PREFIX}."
        kept = {name: value for name, value in state.items() if not name.startswith(own)}
        return kept | self.lora.sharded_state_dict(own, sharded_offsets, metadata)


class ColumnParallelLinear(_WithAdapter, layers.ColumnParallelLinear):
    """Splits rows of the weight over tensor parallel ranks."""

    def add_lora(self, lora: LoRA, *, parts: tuple[int, ...]) -> None:
        """Gives the weight an adapter; `parts` are `ColumnAdapter`'s."""
        rows = self.output_size_per_partition
        self.lora = ColumnAdapter(self.config, lora, rows=rows, parts=parts, tp_group=self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Under tensor parallelism megatron-core's own overlaps its collectives with the products.
        if kwargs["sequence_parallel"] or kwargs["allreduce_dgrad"] or kwargs["bias"] is not None:
            output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return output
        return accumulating_linear(input, weight)


class RowParallelLinear(_WithAdapter, layers.RowParallelLinear):
    """Splits columns of the weight over tensor parallel ranks."""

    def add_lora(self, lora: LoRA) -> None:
        """Gives the weight an adapter."""
        columns = self.input_size_per_partition
        self.lora = RowAdapter(self.config, lora, columns=columns, tp_group=self.tp_group)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return accumulating_linear(input, weight)
