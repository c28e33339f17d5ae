"""Runs megatron-core's parallel linear layers on `accumulating_linear` where no rank waits.

megatron-core adds a weight gradient to its buffer in one pass only with a CUDA extension of Apex.
"""

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

from moe_ext.layers.products import accumulating_linear


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """Splits rows of the weight over tensor parallel ranks."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Under tensor parallelism megatron-core's own overlaps its collectives with the products.
        if kwargs["sequence_parallel"] or kwargs["allreduce_dgrad"] or kwargs["bias"] is not None:
            output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return output
        return accumulating_linear(input, weight)


class RowParallelLinear(layers.RowParallelLinear):
    """Splits columns of the weight over tensor parallel ranks."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return accumulating_linear(input, weight)
