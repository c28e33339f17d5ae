"""Groups share a thread for connections, and compute as torch's own do."""

import datetime

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron.trainer.runtime import gloo
from megatron.trainer.runtime.gloo import share_connections

TIMEOUT = datetime.timedelta(seconds=50)


def threads_of_groups(number: int) -> int:
    """Return how many threads groups beside the default one bring."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        before = psutil.Process().num_threads()
        groups = [dist.new_group([0], timeout=TIMEOUT) for _ in range(number)]
        for group in groups:
            total = torch.tensor([3.0])
            dist.all_reduce(total, group=group)
            assert total.item() == 3.0
            backend = group._get_backend(torch.device("cpu"))
            assert isinstance(backend, dist.ProcessGroupGloo)
            assert backend.options._timeout == TIMEOUT
        return psutil.Process().num_threads() - before
    finally:
        dist.destroy_process_group()


def test_connections_of_all_groups_are_one_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    start = dist.ProcessGroupGloo.__init__
    torchs_own = getattr(start, "__wrapped__", start)  # or an earlier test has let groups share
    monkeypatch.setattr(dist.ProcessGroupGloo, "__init__", torchs_own)
    monkeypatch.setattr(gloo, "_state", {"is_shared": False})
    own = threads_of_groups(5)
    share_connections()
    share_connections()
    assert threads_of_groups(5) == own - 5
