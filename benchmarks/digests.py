"""Gradients in a few numbers, to compare implementations that live in different processes.

A gradient's digest is its norm and its products with random vectors that depend on the tensor's
name alone. If two gradients differ by d, their products differ by about the norm of d.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Digests = Mapping[str, tuple[float, ...]]
"""By tensor: the norm, then the products."""

_PROBES = 2
# A tensor whose gradient is next to nothing is judged against the largest one.
_SMALL = 1e-4


def digest(parts: Iterable[tuple[str, int, Tensor]]) -> Digests:
    """Digests of tensors that come in parts.

    Args:
        parts: name, first row, and the rows of a tensor, of any shape. Both sides of a comparison
            must cut alike.
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
    """The largest difference relative to the expected norm, and whose it is.

    Raises:
        ValueError: other tensors than expected.
    """
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(found.keys() ^ expected.keys())[:4])
        raise ValueError(f"gradients of different tensors were given: {odd}")
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
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.Generator(device=device).manual_seed(number)


def random_tensor(name: str, shape: tuple[int, ...], *, std: float, device: torch.device) -> Tensor:
    """Normal numbers in fp32 that depend on the name (and the kind of device) alone."""
    return torch.randn(shape, generator=_stream(name, device), device=device) * std
