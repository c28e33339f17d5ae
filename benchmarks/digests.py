"""Computes digests of gradients, to compare implementations in different processes.

A gradient's digest is its norm and its products with random vectors that depend on the tensor's
name alone. If two gradients differ by d, their products differ by about the norm of d.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Digests = Mapping[str, tuple[float, ...]]
"""Maps a tensor's name to its norm, then the products."""

_PROBES = 2
# The norm that scales differences is at least this share of the largest norm.
_SMALL = 1e-4


def digest(parts: Iterable[tuple[str, int, Tensor]]) -> Digests:
    """Compute the digests of tensors that are given in parts.

    Args:
        parts: name, first row, and rows of a tensor, of any shape. Both sides of a comparison must
            be split the same way.
    """
    sums: dict[str, list[float]] = {}
    for name, start, rows in parts:
        values = rows.detach().float()
        found = [values.square().sum(dtype=torch.float64).item()]
        for probe in range(_PROBES):
            direction = torch.randn(
                values.shape, generator=_stream(f"{name}:{start}:{probe}", rows.device),
                device=rows.device,
            )  # fmt: skip
            found.append((values * direction).sum(dtype=torch.float64).item())
        total = sums.setdefault(name, [0.0] * len(found))
        sums[name] = [a + b for a, b in zip(total, found, strict=True)]
    return {name: (math.sqrt(square), *products) for name, (square, *products) in sums.items()}


def largest_difference(found: Digests, expected: Digests) -> tuple[float, str]:
    """Return the largest difference relative to the expected norm, and its tensor's name.

    Raises:
        ValueError: the tensors are not the expected ones.
    """
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(found.keys() ^ expected.keys())[:4])
        raise ValueError(f"gradients must be of the same tensors; only one side has {odd}")
    floor = _SMALL * max(norm for norm, *_ in expected.values())
    worst = (0.0, "")
    for name, (norm, *products) in expected.items():
        scale = max(norm, floor)
        for one, other in zip(found[name], (norm, *products), strict=True):
            difference = abs(one - other) / scale if scale else abs(one - other)
            worst = max(worst, (difference, name)) if not math.isnan(difference) else (
                math.inf, name
            )  # fmt: skip
    return worst


def _stream(name: str, device: torch.device) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.Generator(device=device).manual_seed(seed)


def random_tensor(name: str, shape: tuple[int, ...], *, std: float, device: torch.device) -> Tensor:
    """Sample normal fp32 numbers that depend only on the name and the type of device."""
    return torch.randn(shape, generator=_stream(name, device), device=device) * std
