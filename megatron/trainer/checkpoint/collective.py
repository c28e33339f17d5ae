"""Steps that all ranks take together: one that fails anywhere fails everywhere, with one message.

Only object collectives over one group are used; they work on gloo and on NCCL. Without a process
group this process is the only rank, so that single-process tools can look for checkpoints too.
"""

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron.trainer.checkpoint.safe_load import refusal
from megatron.trainer.errors import CheckpointError, UserError

T = TypeVar("T")

_SHOWN_RANKS = 4


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; None is the default group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in `group`; None is the default group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's `value`, in rank order, on every rank. Values must pickle."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)  # all ranks of `group`
    return values


def together(stage: str, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `work` on every rank and wait for all; returns this rank's result.

    Args:
        stage: what is being done, for the message: "writing the shards".
        work: may use collectives only if they cannot leave a rank behind when another one fails.
        group: the ranks taking part.

    Raises:
        CheckpointError: on every rank, if `work` raised on any.
    """
    result: T | None = None
    failure: tuple[str, bool] | None = None
    try:
        result = work()
    # torch's CheckpointException derives from BaseException.
    except (Exception, CheckpointException) as error:
        failure = _describe(error)
    failures = {rank: text for rank, text in enumerate(gather(failure, group)) if text is not None}
    if failures:
        raise CheckpointError(_message(stage, failures))
    return result  # type: ignore[return-value]  # work() returned


def on_rank0(stage: str, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `work` on rank 0 and give its result, which must pickle, to every rank.

    Raises:
        CheckpointError: on every rank, if `work` raised.
    """
    result = together(stage, work if rank_of(group) == 0 else _nothing, group)
    shared: T = gather(result, group)[0]  # type: ignore[assignment]  # rank 0 ran `work`
    return shared


def _nothing() -> None:
    """What the other ranks do meanwhile."""


def _describe(error: BaseException) -> tuple[str, bool]:
    """Text of `error`, and whether it is already a message for the user."""
    if isinstance(error, CheckpointException):
        # torch has gathered the failures of all ranks; the first one tells.
        rank, (cause, _trace) = sorted(error.failures.items())[0]
        text, is_message = _describe(cause)
        return (text, True) if is_message else (f"on rank {rank}: {text}", False)
    if isinstance(error, UserError):
        return str(error), True
    if isinstance(error, pickle.UnpicklingError):  # torch's text advises to load it all the same
        return refusal(error), False
    return f"{type(error).__name__}: {error}", False


def _message(stage: str, failures: dict[int, tuple[str, bool]]) -> str:
    """One message for the failures of some ranks, by rank."""
    texts = {text for text, _ in failures.values()}
    if len(texts) == 1 and all(is_message for _, is_message in failures.values()):
        return texts.pop()
    told = list(
        dict.fromkeys(  # torch tells every rank of one rank's failure
            text if text.startswith("on rank ") else f"on rank {rank}: {text}"
            for rank, (text, _) in failures.items()
        )
    )
    more = len(told) - _SHOWN_RANKS
    return (
        f"{stage} failed {'; '.join(told[:_SHOWN_RANKS])}"
        f"{f'; and on {more} more ranks' if more > 0 else ''}"
    )
