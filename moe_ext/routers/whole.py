"""Gathers what a micro-batch's ranks know of its tokens, and takes a rank's part again.

For rules that compare tokens: whichever ranks share a micro-batch, the rule sees its tokens as one
rank would, in the order of their positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Says how the positions of sequences are split over ranks.

    Context parallel rank r of n holds chunks r and 2n - 1 - r of each sequence, and sequence
    parallel ranks hold equal parts of what their context parallel rank does, one after the other.
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
        for group in (self.sequence_group, self.context_group):
            whole = whole if group is None else _gathered(whole, group)
        if self.context_group.size() == 1:
            return whole
        ordered = torch.empty_like(whole)
        ordered[self._order(len(whole), whole.device)] = whole
        return ordered

    def own(self, values: Tensor) -> Tensor:
        """Returns of values [S, ...] those of this rank's positions, [s, ...]."""
        if self.context_group.size() > 1:
            order = self._order(len(values), values.device)
            values = values[order.chunk(self.context_group.size())[self.context_group.rank()]]
        if self.sequence_group is None:
            return values
        return values.chunk(self.sequence_group.size())[self.sequence_group.rank()]

    def _order(self, length: int, device: torch.device) -> Tensor:
        """Returns the position of each row of what is gathered over the context group, [S]."""
        size = self.context_group.size()
        chunks = torch.arange(length, device=device).chunk(2 * size)
        return torch.cat(
            [chunks[index] for rank in range(size) for index in (rank, 2 * size - 1 - rank)]
        )


def _gathered(values: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() == 1:
        return values
    whole = values.new_empty(len(values) * group.size(), *values.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, values.contiguous(), group=group)
    return whole
