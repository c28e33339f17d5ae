"""Tests which texts share a sequence."""

import itertools

import numpy as np
import pytest

from moe_app.chat.packing import one_each, pack


def packs_of(sizes: list[int], capacity: int) -> list[list[int]]:
    begins, members = pack(sizes, capacity)
    return [members[a:b].tolist() for a, b in itertools.pairwise(begins)]


def plain_best_fit(sizes: list[int], capacity: int) -> list[set[int]]:
    """Try every pack for every member, the largest first."""
    packs: list[set[int]] = []
    for member in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        room = [capacity - sum(sizes[each] for each in found) for found in packs]
        fitting = [index for index in range(len(packs)) if room[index] >= sizes[member]]
        if fitting:
            packs[min(fitting, key=lambda index: room[index])].add(member)
        else:
            packs.append({member})
    return packs


@pytest.mark.parametrize("seed", range(5))
def test_every_member_is_packed_once_into_few_packs(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 33, 200).tolist()
    packs = packs_of(sizes, 32)
    assert sorted(member for found in packs for member in found) == list(range(200))
    assert max(sum(sizes[each] for each in found) for found in packs) <= 32
    assert len(packs) == len(plain_best_fit(sizes, 32))
    assert packs == packs_of(sizes, 32)


def test_packs_are_in_the_order_of_their_first_members() -> None:
    assert packs_of([3, 10, 7, 6, 4], 10) == [[0, 2], [1], [3, 4]]
    assert packs_of([10], 10) == [[0]]
    begins, members = one_each(3)
    assert begins.tolist() == [0, 1, 2, 3] and members.tolist() == [0, 1, 2]
