"""Separates documents within a micro-batch, and splits its positions over ranks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.trainer.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class DocumentRule:
    """Says how the documents within one sequence are kept apart."""

    eod: int
    """Id of the token that ends a document, and belongs to it."""
    reset_position_ids: bool
    """Count positions from 0 in each document."""
    reset_attention_mask: bool
    """Let no query look into an earlier document."""


def separate_documents(batch: Batch, rule: DocumentRule) -> Batch:
    """Number the documents of each row, and the positions within them, as `rule` asks.

    The label at a document's end is the next document's first token, and counts in the loss.
    """
    is_end = batch.tokens == rule.eod  # [b, s]
    documents = is_end.cumsum(dim=1) - is_end.long()  # [b, s], the ends before each position
    position_ids = batch.position_ids
    if rule.reset_position_ids:
        counting = torch.arange(documents.shape[1], device=documents.device)[None]  # [1, s]
        starts = torch.where(is_end, counting + 1, 0).cummax(dim=1).values  # [b, s], of the next
        starts = torch.cat((torch.zeros_like(starts[:, :1]), starts[:, :-1]), dim=1)
        position_ids = counting - starts  # [b, s]
    return replace(
        batch,
        position_ids=position_ids,
        documents=documents if rule.reset_attention_mask else None,
    )


def shard_positions(batch: Batch, *, rank: int, size: int) -> Batch:
    """Return this context parallel rank's shard of each row, chunks rank and 2 size - 1 - rank.

    Args:
        batch: of whole sequences, whose length 2 x `size` divides.
        rank: this rank in its context parallel group.
        size: ranks in the group.

    Returns:
        A batch of s / size positions a row. Documents stay whole, for keys are gathered.
    """
    if size == 1:
        return batch
    length = batch.tokens.shape[1]
    chunks = torch.arange(length, device=batch.tokens.device).chunk(2 * size)
    rows = torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))  # [s / size]

    def take(values: Tensor) -> Tensor:
        return values[:, rows]

    return replace(
        batch,
        tokens=take(batch.tokens),
        labels=take(batch.labels),
        loss_mask=take(batch.loss_mask),
        loss_tokens=batch.loss_mask.sum() if batch.loss_tokens is None else batch.loss_tokens,
        position_ids=take(batch.position_ids),
        places=rows,
    )
