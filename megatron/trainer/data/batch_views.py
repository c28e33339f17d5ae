"""Separates documents within a micro-batch, and splits its positions over ranks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.trainer.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class DocumentRule:
    """Says how the documents within one sequence are kept apart."""

    eod: int | None
    """Id of the token that ends a document, and belongs to it. Random tokens are documents by it
    alone; token files, whose index says where documents end, are held to it. None where no id is
    known."""
    reset_position_ids: bool
    """Count positions from 0 in each document."""
    reset_attention_mask: bool
    """Let no query look into an earlier document."""
    is_varlen: bool = False
    """Do that by computing each document's attention on its own, not by a mask."""


def separate_documents(batch: Batch, rule: DocumentRule) -> Batch:
    """Number the documents of each row, and the positions within them, as `rule` asks.

    The label at a document's end is the next document's first token, and counts in the loss.

    Raises:
        ValueError: The batch does not say where documents begin.
    """
    begins = batch.document_starts  # [b, s]
    is_varlen = rule.reset_attention_mask and rule.is_varlen
    if begins is None or (is_varlen and batch.borders is None):
        raise ValueError(
            "the batch has no document_starts, or no borders; its source must be read with them to"
            " reset anything"
        )
    has_mask = rule.reset_attention_mask and not is_varlen
    position_ids = batch.position_ids
    if rule.reset_position_ids:
        counting = torch.arange(begins.shape[1], device=begins.device)[None]  # [1, s]
        first = torch.where(begins, counting, 0).cummax(dim=1).values  # [b, s], of the document
        position_ids = counting - first  # [b, s]
    return replace(
        batch,
        position_ids=position_ids,
        document_starts=None,
        is_varlen=is_varlen,
        documents=begins.cumsum(dim=1) if has_mask else None,  # [b, s]
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

    def take_if(values: Tensor | None) -> Tensor | None:
        return None if values is None else take(values)

    return replace(
        batch,
        tokens=take(batch.tokens),
        labels=take(batch.labels),
        loss_mask=take(batch.loss_mask),
        loss_tokens=batch.loss_mask.sum() if batch.loss_tokens is None else batch.loss_tokens,
        loss_weights=take_if(batch.loss_weights),
        segments=take_if(batch.segments),
        padding=take_if(batch.padding),
        position_ids=take(batch.position_ids),
        places=rows,
    )
