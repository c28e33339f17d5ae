"""Stands in for DeepEP's exchange between GPUs, with megatron-core's differentiable all-to-all."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

Handle = tuple[Tensor, list[int], list[int], int]
"""Whose token each sent row is [n], rows sent to and received from each rank, and tokens here."""


def dispatch(
    hidden: Tensor, experts: Tensor, gates: Tensor, number: int, group: Any, **_asynchronous: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
    """Send each token [t, h] once to every rank that has some of its experts [t, k], -1 for none.

    Returns rows [r, h], their experts of this rank [r, k] from 0, -1 for others', the gates [r, k],
    how many rows each expert has, and what `combine` needs.
    """
    local = number // group.size()
    owners = torch.where(experts < 0, -1, experts // local)
    rows = [(owners == rank).any(dim=1).nonzero().squeeze(1) for rank in range(group.size())]
    order, sent = torch.cat(rows), [len(each) for each in rows]
    counts = torch.empty(group.size(), dtype=torch.int64)
    dist.all_to_all_single(counts, torch.tensor(sent), group=group)
    received = counts.tolist()
    own = all_to_all(group, experts[order], received, sent) - group.rank() * local
    is_here = (own >= 0) & (own < local)
    own = own.where(is_here, -1)
    gates = all_to_all(group, gates[order], received, sent) * is_here
    sizes = own[is_here].bincount(minlength=local)
    tokens = all_to_all(group, hidden[order], received, sent)
    return tokens, own, gates, sizes, (order, sent, received, len(hidden))


def combine(rows: Tensor, group: Any, handle: Handle, **_asynchronous: bool) -> tuple[Tensor, None]:
    """Send rows [r, h] back and sum each token's [t, h]."""
    order, sent, received, number = handle
    back = all_to_all(group, rows, sent, received)
    return back.new_zeros(number, rows.shape[1]).index_add(0, order, back), None


def install() -> None:
    """Let megatron-core's flexible dispatcher take these for DeepEP's, and compile nothing."""
    token_dispatcher.fused_dispatch = dispatch
    token_dispatcher.fused_combine = combine
    token_dispatcher.set_deepep_num_sms = lambda _number: None
    torch.compiler.set_stance("force_eager")
