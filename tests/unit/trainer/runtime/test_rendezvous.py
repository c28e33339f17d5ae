"""Ranks agree on a key prefix of their own, whatever an earlier attempt has left in the store."""

import datetime
import socket
import threading
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from megatron.trainer.runtime.rendezvous import RendezvousError, agree_on_prefix, rendezvous

SHORT = datetime.timedelta(seconds=0.3)


def attempt(
    store: dist.Store,
    ranks: Sequence[int],
    *,
    world_size: int = 3,
    timeout: datetime.timedelta = datetime.timedelta(seconds=120),
) -> dict[int, str]:
    """Return the prefix or the error of each rank."""
    found: dict[int, str] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = agree_on_prefix(store, rank=rank, world_size=world_size, timeout=timeout)
        except RendezvousError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_of_each_attempt_agree_and_never_with_one_before(order: tuple[int, ...]) -> None:
    store = dist.HashStore()
    prefixes = []
    for _ in range(4):
        found = attempt(store, order)
        assert found.keys() == {0, 1, 2}
        assert len(set(found.values())) == 1
        prefixes.append(found[0])
    assert len(set(prefixes)) == 4


def test_ranks_that_ended_early_do_not_disturb_the_next_attempt() -> None:
    store = dist.HashStore()
    ended = attempt(store, [1, 2], timeout=SHORT)  # without rank 0
    assert all("rank 0 has not answered within 0.3 s" in text for text in ended.values())
    # Without rank 2, which has joined before; rank 1 needs time to join on a crowded machine.
    ended = attempt(store, [0, 1], timeout=5 * SHORT)
    assert "1 of 3 ranks have not joined within 1.5 s: 2; look at" in ended[0]
    found = attempt(store, [0, 1, 2])
    assert len(set(found.values())) == 1
    assert found[0].startswith("attempt/")
    assert not dist.PrefixStore(found[0], store).check(["anything"])


def test_one_rank_alone_waits_for_no_other() -> None:
    assert attempt(dist.HashStore(), [0], world_size=1)[0].startswith("attempt/")


def test_unreachable_meeting_point_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
        ):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(RendezvousError, match=rf"^the ranks cannot meet at .*{port}.*; check"):
            rendezvous(datetime.timedelta(seconds=5))
