"""Holds micro-batches, and says which samples of a global batch are a rank's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.trainer.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Holds one micro-batch of next-token prediction."""

    tokens: Tensor
    """[b, s] int64 input ids."""
    labels: Tensor
    """[b, s] int64, the token that follows each position."""
    loss_mask: Tensor
    """[b, s] float32, 1 where the loss counts."""
    position_ids: Tensor
    """[b, s] int64, where each token stands in its document; [1, s] when all rows are alike."""

    document_starts: Tensor | None = None
    """[b, s] bool, True where a document begins, the first position of a row aside; None where that
    is not known."""
    borders: Tensor | None = None
    """[n + 1] int32, always in host memory: where the n documents of all rows begin, row after row
    of whole sequences, and at last b * s; None where that is not known."""
    is_varlen: bool = False
    """Attention keeps documents apart by `borders`, computing each on its own."""
    documents: Tensor | None = None
    """[b, s of the whole sequence] int64 numbers of the documents that attention keeps apart; None
    puts no mask between them."""
    loss_tokens: Tensor | None = None
    """[] float32, what the sum of losses is divided by; None means the sum of loss_mask."""
    places: Tensor | None = None
    """[s] int64, where this rank's positions stand in the sequence; None means all of it."""
    loss_weights: Tensor | None = None
    """[b, s] float32, a factor of each counted loss in the objective, not in what is reported; None
    means 1."""
    segments: Tensor | None = None
    """[b, s] int64, which of the micro-batch's n texts a label belongs to, -1 where to none; None
    where texts are not told apart."""
    padding: Tensor | None = None
    """[b, s] bool, True where no token is; None where tokens are everywhere."""
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    """Facts of the n texts by name, [n] each; see `RowSource`."""

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on a device; from page-locked memory to a GPU without blocking.

        The borders stay in host memory, where attention needs them to say which part is whose.
        """
        to_gpu = torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=to_gpu)

        moved: dict[str, Any] = {
            name: move(each)
            for name, each in vars(self).items()
            if isinstance(each, Tensor) and name != "borders"
        }
        texts = {name: move(each) for name, each in self.texts.items()}
        return replace(self, **moved, texts=texts)

    def attention_mask(self) -> Tensor | None:
        """Return [b, 1, s, s of the whole sequence] bool, True where a query must not look.

        None where plain causal attention says it all.
        """
        if self.documents is None:
            return None
        everywhere = torch.arange(self.documents.shape[1], device=self.documents.device)
        places = everywhere if self.places is None else self.places
        others = self.documents[:, places, None] != self.documents[:, None, :]  # [b, s, s whole]
        future = everywhere[None, :] > places[:, None]  # [s, s whole]
        return (others | future)[:, None]


def make_batch(
    windows: Sequence[npt.NDArray[np.integer]],
    starts: Sequence[npt.NDArray[np.int64]] | None = None,
    *,
    pin_memory: bool = False,
) -> Batch:
    """Stack windows of [s + 1] tokens each into a micro-batch of [b, s].

    Args:
        windows: Token ids of any integer type.
        starts: The positions of each window, 1 to s - 1, at which a document begins; None where
            that is not known.
        pin_memory: Put the batch in page-locked memory, from which a GPU copies without blocking.
    """
    shape = (len(windows), len(windows[0]) - 1)
    tokens = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)  # [b, s]
    labels = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)  # [b, s]
    loss_mask = torch.empty(shape, dtype=torch.float32, pin_memory=pin_memory)  # [b, s]
    position_ids = torch.empty((1, shape[1]), dtype=torch.int64, pin_memory=pin_memory)
    # By numpy: torch would start threads of its own beside those that compute.
    rows = zip(tokens.numpy(), labels.numpy(), windows, strict=True)
    for row_tokens, row_labels, window in rows:
        row_tokens[:] = window[:-1]
        row_labels[:] = window[1:]
    loss_mask.numpy()[:] = 1.0
    position_ids.numpy()[:] = np.arange(shape[1])
    document_starts = borders = None
    if starts is not None:
        document_starts = torch.empty(shape, dtype=torch.bool, pin_memory=pin_memory)  # [b, s]
        document_starts.numpy()[:] = False
        for row_starts, positions in zip(document_starts.numpy(), starts, strict=True):
            row_starts[positions] = True
        borders = find_borders(document_starts.numpy())
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=position_ids,
        document_starts=document_starts,
        borders=borders,
    )


def find_borders(starts: npt.NDArray[np.bool_]) -> Tensor:
    """Return `Batch.borders` of rows whose documents begin at `starts` [b, s], and at 0."""
    begins = starts.copy()
    begins[:, 0] = True
    return torch.from_numpy(np.append(np.flatnonzero(begins), begins.size).astype(np.int32))


def mask_rows(batch: Batch, is_masked: Sequence[bool]) -> Batch:
    """Take rows out of the loss, but not out of what its sum is divided by.

    So the other rows weigh as much as in a batch in which all rows count.

    Args:
        batch: [b, s] as `make_batch` returns it; its loss_mask is changed.
        is_masked: [b] which rows.
    """
    batch.loss_mask.numpy()[np.array(is_masked, bool)] = 0.0
    return replace(batch, loss_tokens=torch.tensor(float(batch.loss_mask.numel())))


def split_global_batch(
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[range]:
    """Return which samples of a global batch are this rank's, one range a micro-batch.

    Micro-batch j of rank r holds samples (j * data_parallel_size + r) * micro_batch_size and on.
    The micro-batches are thus the same sets of samples for every data parallel size, only computed
    elsewhere, and losses that are not linear in the batch (load balancing) stay comparable.

    Raises:
        ConfigError: The sizes do not divide, or the rank does not exist.
    """
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ConfigError(
            f"data parallel rank {data_parallel_rank} does not exist among {data_parallel_size}"
            f" ranks; it must be 0 to {data_parallel_size - 1}; pass the rank in its own group"
        )
    step = micro_batch_size * data_parallel_size
    if step < 1 or global_batch_size < 1 or global_batch_size % step:
        raise ConfigError(
            f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x data"
            f" parallel size ({micro_batch_size} x {data_parallel_size} = {step}); change"
            " --global-batch-size, --micro-batch-size or the number of ranks"
        )
    first = data_parallel_rank * micro_batch_size
    starts = range(first, global_batch_size, step)
    return [range(start, start + micro_batch_size) for start in starts]
