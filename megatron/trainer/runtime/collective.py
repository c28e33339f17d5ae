"""Keeps ranks in step: what fails on one rank fails on all of them, with one message.

What ranks could see differently, a directory on a network file system above all, is read on rank 0
and broadcast. Only object collectives over one group are used; they work on gloo and on NCCL.
Without a process group this process is the only rank, so that single-process tools can use it too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron.trainer.errors import UserError

T = TypeVar("T")

_SHOWN_RANKS = 4
_SHOWN_DIFFERENCES = 8
_ABSENT = "not there"


class StageError(UserError):
    """Reports that ranks could not finish a stage, for a reason other than the user's input."""


def rank_of(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in `group`; None is the default group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in `group`; None is the default group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's `value`, in rank order, on every rank; values must pickle."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)  # all ranks of `group`
    return values


def gather_on_rank0(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's `value` in rank order on rank 0, and [] elsewhere; it must pickle."""
    if size_of(group) == 1:
        return [value]
    is_first = rank_of(group) == 0
    values = [value] * size_of(group)
    dist.gather_object(value, values if is_first else None, group=group, group_dst=0)
    return values if is_first else []


def broadcast(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's `value` on every rank; it must pickle."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)  # all ranks of `group`
    return values[0]


def on_all_ranks(
    stage: str,
    work: Callable[[], T],
    group: dist.ProcessGroup | None = None,
    *,
    error_class: type[UserError] | None = None,
) -> T:
    """Run `work` on every rank of `group`, and return its result for this rank.

    Args:
        stage: what is being done, for the message: "writing the shards".
        work: may use collectives only if they cannot leave a rank behind when another one fails.
        group: the ranks that take part; None is the default group.
        error_class: raised in place of an error that is no UserError. None raises StageError for
            an OSError; another error goes on unchanged on its own rank, with its traceback, and
            is a StageError on the others.

    Raises:
        UserError: on every rank, if `work` raised on any: the error of the first rank that raised.
    """
    attempt = _try(work)
    failures = {
        rank: failure
        for rank, failure in enumerate(gather(attempt.failure, group))
        if failure is not None
    }
    if failures:
        _raise(stage, failures, attempt.error, error_class)
    return attempt.value  # type: ignore[return-value]  # `work` returned


def on_rank0(
    stage: str,
    work: Callable[[], T],
    group: dist.ProcessGroup | None = None,
    *,
    error_class: type[UserError] | None = None,
) -> T:
    """Run `work` on rank 0 of `group`, and return its result, which must pickle, on every rank.

    Raises:
        UserError: on every rank, if `work` raised; see `on_all_ranks` for the arguments.
    """
    attempt = _try(work) if rank_of(group) == 0 else _Attempt()
    value, failure = broadcast((attempt.value, attempt.failure), group)
    if failure is not None:
        _raise(stage, {0: failure}, attempt.error, error_class)
    return value  # type: ignore[return-value]  # rank 0 ran `work`


def require_same(
    what: str,
    values: Mapping[str, object],
    group: dist.ProcessGroup | None = None,
    *,
    error_class: type[UserError],
    remedy: str,
) -> None:
    """Refuse to go on where a rank has other values than rank 0.

    Args:
        what: the values are, for the message: "settings".
        values: by name; compared by `==`, after they were pickled.
        group: the ranks that take part; None is the default group.
        error_class: raised on every rank.
        remedy: the end of the message.

    Raises:
        UserError: they differ; of class `error_class`, on every rank.
    """
    first = broadcast(dict(values), group)
    own = [
        f"{name}: rank 0 {first.get(name, _ABSENT)}, rank {rank_of(group)} "
        f"{values.get(name, _ABSENT)}"
        for name in dict.fromkeys([*first, *values])
        if first.get(name, _ABSENT) != values.get(name, _ABSENT)
    ]
    different = [line for each in gather(own, group) for line in each]
    if different:
        more = len(different) - _SHOWN_DIFFERENCES
        raise error_class(
            f"{what} differ between ranks: {'; '.join(different[:_SHOWN_DIFFERENCES])}"
            f"{f'; and {more} more' if more > 0 else ''}; {remedy}"
        )


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Describes an error in a form that every rank can be told."""

    text: str
    user_error: type[UserError] | None
    """Its class, where it is an error of the user's."""
    is_os_error: bool


@dataclass(frozen=True)
class _Attempt:
    """Holds what running some work came to: a value, or an error and its description."""

    value: object = None
    error: Exception | None = None
    failure: _Failure | None = None


def _try(work: Callable[[], object]) -> _Attempt:
    try:
        return _Attempt(value=work())
    except UserError as error:
        failure = _Failure(text=str(error), user_error=type(error), is_os_error=False)
        return _Attempt(error=error, failure=failure)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        failure = _Failure(text=text, user_error=None, is_os_error=isinstance(error, OSError))
        return _Attempt(error=error, failure=failure)


def _raise(
    stage: str,
    failures: Mapping[int, _Failure],
    own: Exception | None,
    error_class: type[UserError] | None,
) -> None:
    """Raise one error for the failures of some ranks, by rank.

    Raises:
        UserError: the same on every rank, but where `own`, this rank's error, says more.
    """
    first = min(failures)
    if all(failure.user_error is not None for failure in failures.values()):
        failure = failures[first]
        where = "" if first == 0 else f"on rank {first}: "
        raise failure.user_error(f"{where}{failure.text}") from own  # type: ignore[misc]
    is_explained = all(each.user_error or each.is_os_error for each in failures.values())
    if error_class is None and not is_explained and own is not None:
        raise own
    told = [f"on rank {rank}: {failure.text}" for rank, failure in sorted(failures.items())]
    more = len(told) - _SHOWN_RANKS
    raise (error_class or StageError)(
        f"{stage} failed {'; '.join(told[:_SHOWN_RANKS])}"
        f"{f'; and on {more} more ranks' if more > 0 else ''}"
    ) from own
