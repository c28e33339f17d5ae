"""Lets the ranks of one attempt find each other, apart from those of an earlier attempt.

torchrun keeps one store for a job. After a restart it still holds the keys of the previous attempt,
and torch 2.13 takes the addresses of ended processes for those of the running ones: most restarts
then fail with a refused connection. The restart count cannot tell attempts apart, for each node has
its own. So the ranks agree on a key prefix that is new.
"""

import datetime
import secrets
import time

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from megatron.trainer.errors import UserError

_PAUSE_S = 0.01
_SHOWN_RANKS = 16


class RendezvousError(UserError):
    """Reports that a rank has not joined in time, or that there is nowhere to join."""

    is_local = True


def rendezvous(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """Wait for all ranks that torchrun has started.

    Returns:
        An empty store that only these ranks share, this rank, and the number of ranks; for
        `init_process_group`.

    Raises:
        RendezvousError: some have not joined in time, or MASTER_ADDR cannot be reached.
    """
    try:
        store, rank, world_size = next(iter(torch_rendezvous("env://", timeout=timeout)))
    except dist.DistNetworkError as error:
        raise RendezvousError(
            f"the ranks cannot meet at MASTER_ADDR and MASTER_PORT: {error}; check that this names"
            " the host of rank 0, that other nodes can reach it, and that the port is free there"
        ) from error
    prefix = agree_on_prefix(store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.PrefixStore(prefix, store), rank, world_size


def agree_on_prefix(
    store: dist.Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """Agree on a key prefix among the running ranks, whatever else is in the store.

    Each rank posts a random token; rank 0 writes the prefix under that token, which only the
    running process reads, and waits until each rank has acknowledged it.

    Raises:
        RendezvousError: not all have joined in time.
    """
    token = secrets.token_hex(8)
    if rank != 0:
        store.set(f"join/{rank}", token)
        try:
            store.wait([f"prefix/{token}"], timeout)
        except dist.DistStoreError as error:
            raise RendezvousError(
                f"rank 0 has not answered within {timeout.total_seconds():g} s; look at its log,"
                " and whether its host can be reached from here"
            ) from error
        prefix = store.get(f"prefix/{token}").decode()
        store.set(f"{prefix}/joined/{rank}", "")
        return prefix
    prefix = f"attempt/{token}"
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    answered: set[bytes] = set()
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/joined/{other}"]):
                missing.remove(other)
            elif store.check([f"join/{other}"]):
                posted = store.get(f"join/{other}")
                if posted not in answered:
                    answered.add(posted)
                    store.set(f"prefix/{posted.decode()}", prefix)
        if missing and time.monotonic() > deadline:
            shown = ", ".join(str(each) for each in sorted(missing)[:_SHOWN_RANKS])
            raise RendezvousError(
                f"{len(missing)} of {world_size} ranks have not joined within"
                f" {timeout.total_seconds():g} s: {shown}"
                f"{', ...' if len(missing) > _SHOWN_RANKS else ''}; look at the logs of their nodes"
            )
        time.sleep(_PAUSE_S)
    return prefix
