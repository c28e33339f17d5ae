"""A part of the job's store that no earlier attempt of the job has written to.

torchrun starts the ranks again after one has failed and, unless the job has a static rendezvous,
lets them meet in the very store of the attempt before (seen with torch 2.13): ranks find the
addresses of processes that are gone, and wait for them. torch counts restarts, but not alike on
every node.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from megatron.trainer.errors import ConfigError

_PAUSE_S = 0.02


def fresh_store(store: dist.Store, *, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Agree with the ranks that are alive on a prefix of the store; called by all of them.

    Each rank puts a word of its own into the store; rank 0 answers every word it finds with its
    token until each rank has confirmed that very token. An answer to a dead rank's word harms
    nobody, and a token of an earlier rank 0 answers no word of this attempt.

    Raises:
        ConfigError: a rank is missing; raised by rank 0, naming it, and by those that are there.
    """
    own, token = uuid.uuid4().hex, uuid.uuid4().hex
    if rank:
        store.set(f"attempt/hello/{rank}", own)
        try:
            store.wait([f"attempt/answer/{own}"], timeout)
        except dist.DistStoreError as error:
            raise _missing("rank 0 has", timeout) from error
        token = store.get(f"attempt/answer/{own}").decode()
        store.set(f"attempt/confirmed/{token}/{rank}", "1")
        return dist.PrefixStore(f"attempt/{token}", store)
    deadline = time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, world_size)), dict[int, str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"attempt/confirmed/{token}/{other}"]):
                missing.remove(other)
            elif store.check([f"attempt/hello/{other}"]):
                word = store.get(f"attempt/hello/{other}").decode()
                if answered.get(other) != word:
                    store.set(f"attempt/answer/{word}", token)
                    answered[other] = word
        if missing and time.monotonic() > deadline:
            names = ", ".join(str(other) for other in sorted(missing)[:8])
            raise _missing(f"of {world_size} ranks, {len(missing)} ({names}) have", timeout)
        time.sleep(_PAUSE_S if missing else 0.0)
    return dist.PrefixStore(f"attempt/{token}", store)


def _missing(who: str, timeout: timedelta) -> ConfigError:
    error = ConfigError(
        f"{who} not come to the start of the job within {timeout.total_seconds():g} s; every rank"
        " must be started; look at the logs of the nodes, or raise --distributed-timeout-minutes"
    )
    error.is_local = True
    return error
