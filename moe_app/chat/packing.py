"""Says which texts share a sequence."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Packs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""[num_packs + 1] where each pack begins among the members, and [num_members] their numbers."""


def one_each(count: int) -> Packs:
    """Return packs of one member each."""
    return np.arange(count + 1), np.arange(count)


def pack(sizes: Sequence[int] | npt.NDArray[np.integer], capacity: int) -> Packs:
    """Pack members into as few packs as best-fit decreasing needs.

    The largest comes first, each into the fullest pack that has room for it; members of a size, and
    packs with the same room, are taken in order. The result depends on the sizes alone.

    Args:
        sizes: Of each member, at most the capacity.
        capacity: Of a pack.

    Returns:
        Packs in the order of their first members; members in order.
    """
    by_size = np.asarray(sizes, dtype=np.int64)
    pack_of = np.empty(len(by_size), dtype=np.int64)  # [num_members]
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    """Bit r is set where a pack has room for r more."""
    num_packs = 0
    for member in np.argsort(-by_size, kind="stable").tolist():
        size = int(by_size[member])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, num_packs
            num_packs += 1
        pack_of[member] = chosen
        left = room - size
        if left:
            with_room[left].append(chosen)
            rooms |= 1 << left
    firsts = np.full(num_packs, len(by_size), dtype=np.int64)
    np.minimum.at(firsts, pack_of, np.arange(len(by_size)))
    rank = np.empty(num_packs, dtype=np.int64)
    rank[np.argsort(firsts, kind="stable")] = np.arange(num_packs)
    members = np.argsort(rank[pack_of], kind="stable")
    counts = np.bincount(rank[pack_of], minlength=num_packs)
    return np.concatenate([[0], np.cumsum(counts)]), members
