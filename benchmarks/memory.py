"""Measures the peak memory of this process since a chosen moment.

On a GPU this is the peak of the allocator; on a CPU the growth of the resident set, whose peak
Linux records and lets a process reset.
"""

import ctypes
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


class PeakMemory:
    """Measures peak memory above what the process held at construction.

    Args:
        device: device whose memory is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._before = 0 if self._is_cuda else resident_bytes("VmRSS")

    def restart(self) -> None:
        """Reset the peak to the memory in use now.

        Freed memory that the allocator keeps is returned to the system first, so that only what the
        following work needs is counted.
        """
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            library = ctypes.CDLL(None)
            if hasattr(library, "malloc_trim"):
                library.malloc_trim(0)
            _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")

    def peak_bytes(self) -> int:
        """Return the peak since `restart`, minus the memory at construction."""
        if self._is_cuda:
            return int(torch.cuda.max_memory_allocated())
        return resident_bytes("VmHWM") - self._before


def resident_bytes(field: str) -> int:
    """Return VmRSS (current) or VmHWM (peak) of this process.

    Raises:
        ValueError: the system has no such field.
    """
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}; memory on a CPU is measured on Linux only")
