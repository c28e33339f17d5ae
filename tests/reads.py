"""Counts where the host waits for tensors that would be on a device."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.paths import REPO

_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "is_nonzero"),
        *("__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__"),
    )
) | {torch.nonzero, torch.masked_select, torch.equal, torch.allclose, torch.unique}
_NO_WAITS = {
    "moe_ext/experts/blockwise.py _sizes": "the backend for CPUs",
    "moe_ext/functional.py check_on_device": "a device-side assertion on a GPU",
    "moe_ext/routers/base.py <genexpr>": "on CPUs alone, in _check_shapes",
    "megatron/trainer/runtime/cpu_backend.py _as_list": "for gloo",
    "megatron/core/tensor_parallel/random.py fork": "states of generators are in host memory",
}


class ReadCounter(TorchFunctionMode):
    """Counts, by file and function, calls that return what tensors hold to the host.

    On a GPU each waits for all work before it. What would not is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or _is_selection(func, args):
            self._note(1)
        elif func.__name__ == "tensor":  # of a list, whose tensors are read one by one
            self._note(_tensors_in(args[0]))
        return func(*args, **(kwargs or {}))

    def _note(self, number: int) -> None:
        frame = sys._getframe(2)
        path = Path(frame.f_code.co_filename)
        if "site-packages" in path.parts:  # first, for they may be below the repository
            place = "/".join(path.parts[path.parts.index("site-packages") + 1 :])
        else:
            place = path.relative_to(REPO).as_posix() if path.is_relative_to(REPO) else path.name
        site = f"{place} {frame.f_code.co_name}"
        if number and site not in _NO_WAITS:
            self.sites[site] += number


def _is_selection(func: Any, args: Any) -> bool:
    """Say whether this is an index of flags, which has to count them; filling does not."""
    if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
        return False
    if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        return False
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices)


def _tensors_in(values: Any) -> int:
    if isinstance(values, list | tuple):
        return sum(_tensors_in(each) for each in values)
    return int(isinstance(values, torch.Tensor))
