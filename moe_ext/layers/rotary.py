"""Computes the angles of rotary position embeddings from the position ids of the batch."""

import torch
from torch import Tensor


def inverse_frequencies(
    num_channels: int, base: float, device: torch.device | None = None
) -> Tensor:
    """Computes the angle [hn / 2] fp32 of one position; arguments as `RotaryAngles`'s."""
    channels = torch.arange(0, num_channels, 2, dtype=torch.float32, device=device)
    frequencies: Tensor = 1.0 / (base ** (channels / num_channels))
    return frequencies


class RotaryAngles:
    """Computes the angles of RoPE for any positions.

    Following the position ids lets a row begin anywhere (a key-value cache), restart (several
    documents in a row) and be part of a longer one (context parallelism), without special cases.
    The frequencies stay fp32 whatever the model computes in.

    Source: Su et al., "RoFormer" (2021), section 3.2.2, in the half-rotation layout.

    Args:
        num_channels: rotated channels of a head (hn), an even number.
        base: base of the wavelengths, `rope_theta` in transformers.
    """

    def __init__(self, num_channels: int, *, base: float) -> None:
        self._num_channels = num_channels
        self._base = base
        self._inv_freq: Tensor | None = None

    def __call__(self, position_ids: Tensor) -> Tensor:
        """Computes angles [s, 1 or b, 1, hn] fp32 of position ids [1 or b, s]."""
        positions = position_ids.t().to(torch.float32)  # [s, b]
        angles = positions[..., None] * self._frequencies(position_ids.device)  # [s, b, hn / 2]
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]  # [s, b, 1, hn]

    def _frequencies(self, device: torch.device) -> Tensor:
        """Returns the inverse frequencies [hn / 2], kept on the device of the last call."""
        if self._inv_freq is None or self._inv_freq.device != device:
            self._inv_freq = inverse_frequencies(self._num_channels, self._base, device)
        return self._inv_freq
