"""How the ranks of one attempt find each other, and nobody else.

torchrun keeps one store for a job: after a restart it still holds what the ranks of the attempt
before wrote there, and torch 2.13 takes the addresses of the dead for those of the living. Most
restarts then fail with a refused connection. The count of restarts does not tell attempts apart,
for each node has its own. So the ranks agree on a part of the store that is new.
"""

import datetime
import secrets
import time

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron.trainer.errors import UserError

_PAUSE_S = 0.01
_SHOWN_RANKS = 16


class MeetingError(UserError):
    """A rank has not come."""

    is_local = True


def meet(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """Wait for all ranks that torchrun has started.

    Returns:
        A store that holds nothing yet and is shared by these ranks alone, this rank, and how many
        there are; for `init_process_group`.

    Raises:
        MeetingError: some have not come in time.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    prefix = agree_on_prefix(store, rank=rank, world_size=world_size, timeout=timeout)
    return dist.PrefixStore(prefix, store), rank, world_size


def agree_on_prefix(
    store: dist.Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> str:
    """A name that ranks which are here now agree on, whatever others have left in the store.

    Each rank says hello with a word of its own; rank 0 answers under that word, which the dead
    cannot hear, and waits until each has thanked it.

    Raises:
        MeetingError: not all have come in time.
    """
    word = secrets.token_hex(8)
    if rank != 0:
        store.set(f"hello/{rank}", word)
        try:
            store.wait([f"welcome/{word}"], timeout)
        except dist.DistStoreError as error:
            raise MeetingError(
                f"rank 0 has not answered within {timeout.total_seconds():g} s; look at its log,"
                " and whether its host can be reached from here"
            ) from error
        prefix = store.get(f"welcome/{word}").decode()
        store.set(f"{prefix}/thanks/{rank}", "")
        return prefix
    prefix = f"attempt/{word}"
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    welcomed: set[bytes] = set()
    while missing:
        for other in sorted(missing):
            if store.check([f"{prefix}/thanks/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                said = store.get(f"hello/{other}")
                if said not in welcomed:
                    welcomed.add(said)
                    store.set(f"welcome/{said.decode()}", prefix)
        if missing and time.monotonic() > deadline:
            shown = ", ".join(str(each) for each in sorted(missing)[:_SHOWN_RANKS])
            raise MeetingError(
                f"{len(missing)} of {world_size} ranks have not come within"
                f" {timeout.total_seconds():g} s: {shown}"
                f"{', ...' if len(missing) > _SHOWN_RANKS else ''}; look at the logs of their nodes"
            )
        time.sleep(_PAUSE_S)
    return prefix
