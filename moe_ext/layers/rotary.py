"""Rotary position embedding that follows the position ids of the batch."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class PositionRotaryEmbedding(RotaryEmbedding):
    """The angles of RoPE for the positions that the model was last given.

    megatron-core's embedding counts from 0 along each sequence. Taking the position ids at their
    word lets a row begin anywhere (a key-value cache), begin again (several documents in a row)
    and be a part of a longer one (context parallelism), all without another case.

    Source: Su et al., "RoFormer" (2021), section 3.2.2, in the half-rotation layout.
    """

    inv_freq: Tensor
    positions: Tensor | None = None
    """[1 or b, s] of the batch at hand, or None outside a forward pass."""

    def forward(self, max_seq_len: int, *_args: Any, **_kwargs: Any) -> Tensor:
        """Angles [s, 1 or b, 1, hn] fp32; `max_seq_len` is the s that megatron-core derived.

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
        """Positions in the batch at hand (s), this context parallel rank's."""
        return 0 if self.positions is None else int(self.positions.shape[-1])
