"""Checks arrays of chosen experts, and counts in them."""

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]
"""Integers of any width: experts, domains, tokens."""
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CHUNK = 1 << 16
"""Tokens that are expanded at a time."""


def check_experts(experts: Ids, *, num_experts: int) -> None:
    """Refuses what is no [t, k] array of experts.

    Raises:
        ValueError: another number of axes, or an expert out of range.
    """
    if experts.ndim != 2:
        raise ValueError(f"chosen experts must be [t, k], but they are {list(experts.shape)}")
    check_range(experts, num_experts, what="expert")


def check_range(ids: Ids, size: int, *, what: str) -> None:
    """Refuses ids outside 0 to `size` - 1.

    Raises:
        ValueError: names the first bound that is broken.
    """
    if ids.size == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        wrong = least if least < 0 else most
        raise ValueError(f"{what} {wrong} is out of range; there are {size}, counted from 0")


def count_pairs(rows: Ids, columns: Ids, *, shape: tuple[int, int]) -> Counts:
    """Counts how often each pair occurs.

    Args:
        rows: [n] first of each pair.
        columns: [n] second of each pair.
        shape: numbers of possible firsts and seconds.

    Returns:
        Counts of that shape.
    """
    flat = rows.astype(np.int64) * shape[1] + columns
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def selection(experts: Ids, *, num_experts: int) -> npt.NDArray[np.bool_]:
    """Returns [t, e], true where an expert was chosen."""
    chosen = np.zeros((len(experts), num_experts), dtype=np.bool_)
    np.put_along_axis(chosen, experts.astype(np.intp), True, axis=1)
    return chosen


def ratio(counts: npt.NDArray[Any], totals: npt.NDArray[Any]) -> Floats:
    """Divides, with NaN where the total is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(totals > 0, counts / totals, np.nan)
    return found
