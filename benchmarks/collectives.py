"""Records the collectives that a process takes part in, and the bytes of each.

Every function of torch.distributed calls a method of ProcessGroup. Those methods are wrapped, so it
does not matter under which name a library has imported a function.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.trainer.health.patch_collectives import patched_methods
from moe_ext.compat import expert_norm_group


class Call(NamedTuple):
    """Describes one collective or point-to-point message."""

    kind: str
    """Name in `moe_ext.cost.traffic`, or ProcessGroup's name for kinds unknown there."""
    group: str
    """Name of the group, or its own description if it has no name."""
    payload_bytes: int
    """Same as `moe_ext.cost.traffic.Collective.payload_bytes`, for this call on this rank."""


def _bytes(tensors: Any) -> int:
    """Sum the bytes of a tensor, or of nested lists of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors)


def _argument(position: int) -> Callable[..., int]:
    return lambda *arguments, **_named: _bytes(arguments[position])


_METHODS: Mapping[str, tuple[str, Callable[..., int]]] = {
    # torch 2.13 has new names for _allgather_base and others.
    "allreduce": ("all_reduce", _argument(0)),
    "allreduce_coalesced": ("all_reduce", _argument(0)),
    "allgather": ("all_gather", _argument(0)),
    "_allgather_base": ("all_gather", _argument(0)),
    "allgather_into_tensor_coalesced": ("all_gather", _argument(0)),
    "all_gather_single": ("all_gather", _argument(0)),
    "all_gather_single_coalesced": ("all_gather", _argument(0)),
    "reduce_scatter": ("reduce_scatter", _argument(1)),
    "_reduce_scatter_base": ("reduce_scatter", _argument(1)),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _argument(1)),
    "reduce_scatter_single": ("reduce_scatter", _argument(1)),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _argument(1)),
    "alltoall": ("all_to_all", _argument(1)),
    "alltoall_base": ("all_to_all", _argument(1)),
    "all_to_all_single": ("all_to_all", _argument(1)),
    "send": ("send", _argument(0)),
    "recv": ("receive", _argument(0)),
    "recv_anysource": ("receive", _argument(0)),
    "broadcast": ("broadcast", _argument(0)),
    "reduce": ("reduce", _argument(0)),
    "gather": ("gather", _argument(1)),
    "scatter": ("scatter", _argument(0)),
    "barrier": ("barrier", lambda *_arguments, **_named: 0),
}


@contextmanager
def recording(groups: Mapping[str, ProcessGroup | None]) -> Iterator[Counter[Call]]:
    """Count this process's collectives while the context lasts.

    Groups of one rank are ignored. Messages that megatron-core sends over the world group, to keep
    the two directions apart, count as pipeline messages.

    Args:
        groups: groups by name; the first name of a group is used. None for a group without this
            rank.

    Yields:
        The number of calls of each kind so far.
    """
    names: dict[str, str] = {}
    for name, group in groups.items():
        if group is not None:
            names.setdefault(group.group_name, name)
    calls: Counter[Call] = Counter()

    def wrapped(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind, count = _METHODS[method]

        def call(group: ProcessGroup, *arguments: Any, **named: Any) -> Any:
            if group.size() > 1:
                name = names.get(group.group_name, group.group_desc)
                if kind in ("send", "receive") and name == "world":
                    name = "pp"
                calls[Call(kind, name, count(*arguments, **named))] += 1
            return original(group, *arguments, **named)

        return call

    with patched_methods(ProcessGroup, _METHODS, wrapped):
        yield calls


def named_groups(collection: Any) -> dict[str, ProcessGroup | None]:
    """Map the names of `moe_ext.cost.traffic` to a run's groups.

    Args:
        collection: megatron-core's ProcessGroupCollection.
    """
    fields = {
        "tp": "tp",
        "etp": "expt_tp",
        "ep": "ep",
        "tp_ep": "tp_ep",
        "pp": "pp",
        "cp": "cp",
        "tp_cp": "tp_cp",
        "dp": "dp",
        "dp_cp": "dp_cp",
        "expt_dp": "expt_dp",
        "embd": "embd",
        "mp": "mp",
        "dist_opt": "intra_dist_opt",
    }
    found = {name: getattr(collection, field) for name, field in fields.items()}
    found["tp_ep_pp"] = expert_norm_group(collection)
    return {"world": torch.distributed.group.WORLD, **found}
