"""Peak memory of this process since a moment of one's choice.

On a GPU what the allocator handed out at most; on a CPU growth of the resident set, which Linux
keeps the highest value of and lets a process forget.
"""

import ctypes
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


class PeakMemory:
    """Peak memory over what the process held when this was made.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._before = 0 if self._is_cuda else resident_bytes("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far; what is held now still counts.

        What was freed and kept for later goes back to the system first, so that only what the
        following work needs is counted, whatever the allocator's habits.
        """
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            library = ctypes.CDLL(None)
            if hasattr(library, "malloc_trim"):
                library.malloc_trim(0)
            _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")

    def peak_bytes(self) -> int:
        """Highest since `restart`, less what was there before this was made."""
        if self._is_cuda:
            return int(torch.cuda.max_memory_allocated())
        return resident_bytes("VmHWM") - self._before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process.

    Raises:
        ValueError: the system does not say.
    """
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}; memory on a CPU is measured on Linux only")
