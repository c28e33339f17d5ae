"""Ranks that meet in a store with the words of an earlier attempt in it."""

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.trainer.attempts import fresh_store
from megatron.trainer.errors import ConfigError


def meet(store: dist.Store, ranks: list[int], *, seconds: float = 20.0) -> list[Future[dist.Store]]:
    """Each rank in a thread of its own, the later ones later."""
    timeout = timedelta(seconds=seconds)

    def come(rank: int) -> dist.Store:
        time.sleep(0.05 * rank)
        return fresh_store(store, rank=rank, world_size=3, timeout=timeout)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return [threads.submit(come, rank) for rank in ranks]


def test_each_attempt_gets_an_empty_part_that_its_ranks_share() -> None:
    store = dist.HashStore()
    for attempt in range(3):
        parts = [each.result() for each in meet(store, [2, 0, 1])]
        assert not parts[0].check(["address"])
        parts[0].set("address", str(attempt))
        assert [part.get("address") for part in parts] == [str(attempt).encode()] * 3


def test_attempt_that_only_some_ranks_saw_does_no_harm() -> None:
    """A rank had died before it came: the others' words are in the store, and old answers."""
    store = dist.HashStore()
    for ranks in ([1, 2], [0, 2], [0, 1]):
        first = meet(store, ranks, seconds=0.3)[0]
        assert isinstance(first.exception(), ConfigError)
    parts = [each.result() for each in meet(store, [0, 1, 2])]
    parts[1].set("key", "value")
    assert [part.get("key") for part in parts] == [b"value"] * 3


def test_rank_that_does_not_come_is_named() -> None:
    messages = [str(each.exception()) for each in meet(dist.HashStore(), [0, 2], seconds=0.5)]
    assert messages[0] == (
        "of 3 ranks, 1 (1) have not come to the start of the job within 0.5 s; every rank must be"
        " started; look at the logs of the nodes, or raise --distributed-timeout-minutes"
    )
    error = meet(dist.HashStore(), [2], seconds=0.3)[0].exception()
    assert isinstance(error, ConfigError) and error.is_local
    assert re.match("rank 0 has not come to the start of the job within 0.3 s", str(error))


def test_one_rank_waits_for_nobody() -> None:
    timeout = timedelta(seconds=1)
    part = fresh_store(dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    part.set("a", "b")
    with pytest.raises(dist.DistStoreError):
        part.wait(["c"], timedelta(milliseconds=10))
