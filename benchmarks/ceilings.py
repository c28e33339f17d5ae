"""Measures the machine's ceilings, a large GEMM and a copy, like any implementation."""

import time
from collections.abc import Mapping

import torch

from benchmarks.digests import Digests, random_tensor
from benchmarks.timing import synchronize

COPY_BYTES = 256 * 2**20
"""Larger than any cache."""
_LAUNCHES = {"cpu": 2, "cuda": 20}


class Ceilings:
    """Runs a GEMM [n, n] x [n, n] of the dtype, and a copy of COPY_BYTES.

    Args:
        device: device to measure.
        dtype: dtype of the GEMM.
        size: n.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        self._device, self._size = device, size
        self._launches = _LAUNCHES[device.type]
        matrices = (random_tensor(name, (size, size), std=1.0, device=device) for name in "ab")
        self._left, self._right = (matrix.to(dtype) for matrix in matrices)
        self._product = torch.empty_like(self._left)
        numbers = COPY_BYTES // 4
        self._source = random_tensor("source", (numbers,), std=1.0, device=device)
        self._target = torch.ones_like(self._source)

    def check(self) -> tuple[float, Digests]:
        """Return nothing to compare."""
        return 0.0, {}

    def sample(self, number: int) -> Mapping[str, float]:
        """Measure `flops_per_second` and `copy_bytes_per_second` (read and written)."""
        started = self._now()
        for _ in range(self._launches):
            torch.mm(self._left, self._right, out=self._product)
        between = self._now()
        for _ in range(self._launches):
            self._target.copy_(self._source)
        ended = self._now()
        return {
            "seconds": ended - started,
            "flops_per_second": self._launches * 2.0 * self._size**3 / (between - started),
            "copy_bytes_per_second": self._launches * 2.0 * COPY_BYTES / (ended - between),
        }

    def release(self) -> None:
        """Keep the operands."""

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def build_ceilings(device: torch.device, dtype: torch.dtype, size: int) -> Ceilings:
    """Build the ceilings in a worker."""
    return Ceilings(device, dtype, size)
