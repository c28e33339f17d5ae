"""Patches methods of a class for a while; lists the methods in which collectives end."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "send",
    "recv",
    "recv_anysource",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "barrier",
)
"""Methods of ProcessGroup in which the functions of torch.distributed end, under whatever name a
library has imported them. torch 2.13 has new names for what older ones call _allgather_base and so
on; a version of torch has some of these."""


@contextmanager
def patched_methods(
    owner: type,
    names: Iterable[str],
    wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replace methods of a class, in this process and within the context.

    Args:
        owner: the class.
        names: of methods; those that the class lacks are skipped.
        wrap: makes the new method from a name and the original, which takes the instance first.
    """
    # From vars: what getattr returns would no longer bind to an instance.
    originals = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        for name, original in originals.items():
            setattr(owner, name, wrap(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)
