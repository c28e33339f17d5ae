"""Groups share a thread for connections, and compute as torch's own do."""

import datetime
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron.trainer.runtime import gloo
from megatron.trainer.runtime.gloo import share_connections

TIMEOUT = datetime.timedelta(seconds=50)


def listening() -> int:
    """Return how many sockets this process listens on."""
    return sum(each.status == "LISTEN" for each in psutil.Process().net_connections("tcp"))


def threads_of_groups(number: int) -> int:
    """Return how many threads groups beside the world's bring."""
    quiet = listening()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        assert listening() > quiet
        before = psutil.Process().num_threads()
        for _ in range(number):
            start_and_use_group()
        brought = psutil.Process().num_threads() - before
    finally:
        dist.destroy_process_group()
    assert listening() == quiet, "a world that is gone still listens"
    return brought


def start_and_use_group() -> None:
    group = dist.new_group([0], timeout=TIMEOUT)
    total = torch.tensor([3.0])
    dist.all_reduce(total, group=group)
    assert total.item() == 3.0
    backend = group._get_backend(torch.device("cpu"))
    assert isinstance(backend, dist.ProcessGroupGloo)
    assert backend.options._timeout == TIMEOUT


def test_connections_of_all_groups_are_one_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # An earlier test may have let groups share.
    monkeypatch.setattr(dist.ProcessGroupGloo, "__init__", gloo._start)
    own = threads_of_groups(5)
    share_connections()
    share_connections()
    assert threads_of_groups(5) == own - 5
    assert threads_of_groups(5) == own - 5


def test_other_ways_to_start_a_group_are_torchs() -> None:
    share_connections()
    kind: Any = dist.ProcessGroupGloo
    store, options = dist.HashStore(), kind._Options()
    named = kind(store=store, rank=0, size=1, timeout=TIMEOUT)
    assert named.options._timeout == TIMEOUT
    placed = kind(dist.PrefixStore("a", store), 0, 1, TIMEOUT)
    assert placed.options._timeout == TIMEOUT
    options._devices = named.options._devices
    given = kind(dist.PrefixStore("b", store), 0, 1, options)
    assert given.options._timeout == options._timeout
