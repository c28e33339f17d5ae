"""Projects hidden states to the vocabulary, or lends its weight to a head that makes no logits."""

from collections.abc import Callable

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class OutputLayer(ColumnParallelLinear):
    """Computes logits, or what a function makes of hidden states and this layer's weight.

    megatron-core's hooks on a module's call wait for its weights to be gathered: whoever needs the
    weight alone has to call this layer, too.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        compute: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes megatron-core's output and bias, or `compute` of input and weight, and None.

        Args:
            input_: [s, b, h], this rank's part of s under sequence parallelism.
            weight: [v of this rank, h]; None takes this layer's own.
            runtime_gather_output: gather the logits of all tensor parallel ranks.
            compute: takes hidden states and weight, and returns what takes the logits' place.
        """
        if compute is not None:
            return compute(input_, self.weight if weight is None else weight), None
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        return logits, bias
