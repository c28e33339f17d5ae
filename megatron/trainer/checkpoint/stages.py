"""Runs stages of saving and loading: a failure in one is a CheckpointError on every rank."""

import contextlib
import pickle
from collections.abc import Iterator
from functools import partial

from torch.distributed.checkpoint.api import CheckpointException

from megatron.trainer.checkpoint.safe_load import refusal
from megatron.trainer.errors import CheckpointError, UserError
from megatron.trainer.runtime import collective

on_all_ranks = partial(collective.on_all_ranks, error_class=CheckpointError)
"""`collective.on_all_ranks` with CheckpointError for errors of any other class than UserError."""
on_rank0 = partial(collective.on_rank0, error_class=CheckpointError)
"""`collective.on_rank0`, likewise."""


@contextlib.contextmanager
def torch_errors_explained(stage: str) -> Iterator[None]:
    """Raise the errors that torch gathers from all ranks, and refused pickles, as one message.

    Args:
        stage: what is being done: "writing the shards".

    Raises:
        CheckpointError: where torch raised; on every rank alike, if it gathered the errors.
    """
    try:
        yield
    except CheckpointException as error:  # which derives from BaseException
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, UserError):
            raise CheckpointError(str(cause)) from error
        raise CheckpointError(f"{stage} failed on rank {rank}: {_describe(cause)}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{stage} failed: {_describe(error)}") from error


@contextlib.contextmanager
def write_errors_kept() -> Iterator[None]:
    """Raise the OSError of a failed write in place of the RuntimeError with which torch hides it.

    torch closes its archive after a failed write, and that failure ("unexpected pos") is what it
    raises; a full disk would not be named.
    """
    try:
        yield
    except RuntimeError as error:
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__context__
        if hidden is None:
            raise
        raise hidden from error


def _describe(error: BaseException) -> str:
    """Return an error's text; torch's for a refused pickle advises to load it all the same."""
    if isinstance(error, pickle.UnpicklingError):
        return refusal(error)
    return f"{type(error).__name__}: {error}"
