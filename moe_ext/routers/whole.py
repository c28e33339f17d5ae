"""Gathers what a micro-batch's ranks know of its tokens, and takes a rank's part again.

For rules that compare tokens: whichever ranks share a micro-batch, the rule sees its tokens as one
rank would, in the order of their positions.
"""

from dataclasses import dataclass

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_ext.layers.context_parallel import gather_sequence, own_positions


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Says how the positions of sequences are split over ranks.

    Context parallel ranks hold chunks as `layers.context_parallel` says, and sequence parallel
    ranks equal parts of what their context parallel rank does, one after the other.
    """

    context_group: ProcessGroup
    sequence_group: ProcessGroup | None
    """The tensor parallel ranks under sequence parallelism; None without."""

    def gather(self, values: Tensor) -> Tensor:
        """Returns values of all positions, without a gradient; a collective call.

        Args:
            values: [s, ...] of this rank's positions.

        Returns:
            [S, ...] of all, in order.
        """
        whole = values.detach()
        if self.sequence_group is not None:
            whole = gather_from_sequence_parallel_region(
                whole.contiguous(), group=self.sequence_group
            )
        return gather_sequence(whole, self.context_group)

    def own(self, values: Tensor) -> Tensor:
        """Returns of values [S, ...] those of this rank's positions, [s, ...]."""
        values = own_positions(values, self.context_group)
        if self.sequence_group is None:
            return values
        return values.chunk(self.sequence_group.size())[self.sequence_group.rank()]
