"""Computes rotary position embeddings from the position ids of the batch."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class PositionRotaryEmbedding(RotaryEmbedding):
    """Computes the angles of RoPE for the positions that the model was last given.

    megatron-core's embedding counts from 0 along each sequence. Following the position ids lets a
    row begin anywhere (a key-value cache), restart (several documents in a row) and be part of a
    longer one (context parallelism), without special cases.

    Source: Su et al., "RoFormer" (2021), section 3.2.2, in the half-rotation layout.
    """

    inv_freq: Tensor
    positions: Tensor | None = None
    """[1 or b, s] of the batch at hand, or None outside a forward pass."""

    def forward(self, max_seq_len: int, *_args: Any, **_kwargs: Any) -> Tensor:
        """Computes angles [s, 1 or b, 1, hn] fp32; `max_seq_len` is megatron-core's s.

        Raises:
            ValueError: there are no positions, or they are too few.
        """
        if self.positions is None:
            raise ValueError("there are no position ids; call the model, which sets them")
        if self.inv_freq.device != self.positions.device:
            self.inv_freq = self.inv_freq.to(self.positions.device)
        angles = self.positions.t().to(torch.float32)[..., None] * self.inv_freq  # [s, b, hn / 2]
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]  # [s, b, 1, hn]

    def get_rotary_seq_len(self, *_args: Any, **_kwargs: Any) -> int:
        """Returns the number of positions of the batch (s) on this context parallel rank."""
        return 0 if self.positions is None else int(self.positions.shape[-1])
