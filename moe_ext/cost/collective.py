"""Collectives as numbers: kind, group, bytes, and what of them leaves a rank."""

from dataclasses import dataclass
from typing import Literal

from moe_ext.cost.param_shards import Layout

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "receive"]
Group = Literal[
    "tp", "cp", "tp_cp", "pp", "dp", "dp_cp", "embd", "mp",
    "ep", "etp", "tp_ep", "tp_ep_pp", "expt_dp", "dist_opt", "world",
]  # fmt: skip
"""megatron-core's groups. `etp` shares an expert's matrices, `tp_ep` is ETP x EP, `mp` is TP x PP,
`tp_ep_pp` is ETP x EP x PP, `embd` the first and the last stage, `dist_opt` all ranks."""
Purpose = Literal[
    "attention", "qk_norm", "context", "feed_forward", "router", "dispatch_sizes", "dispatch",
    "combine", "embedding", "head", "pipeline", "gradients", "parameters", "grad_norm", "loss",
    "records",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A kind of call that a rank makes several times a step."""

    kind: Kind
    """What is done; a send and a receive are one message each."""
    group: Group
    """Among whom."""
    num_ranks: int
    """Ranks of that group."""
    count: int
    """Calls a step."""
    payload_bytes: float
    """Of one call: what is reduced, the gathered whole, what is scattered, what a rank hands to an
    all-to-all (its own part of it included), a message."""
    purpose: Purpose
    """What for."""

    @property
    def wire_bytes(self) -> float:
        """What leaves this rank in one call: ring algorithms, and pairs for an all-to-all."""
        others = (self.num_ranks - 1) / self.num_ranks
        factors = {"all_reduce": 2 * others, "send": 1.0, "receive": 0.0}
        return factors.get(self.kind, others) * self.payload_bytes

    @property
    def step_bytes(self) -> float:
        """What leaves this rank in a step."""
        return self.count * self.wire_bytes


def group_size(layout: Layout, group: Group) -> int:
    """Ranks in a group of the layout."""
    tensor, experts = layout.tensor, layout.expert_tensor * layout.expert
    world = tensor * layout.context * layout.data * layout.pipeline
    return {
        "tp": tensor,
        "cp": layout.context,
        "tp_cp": tensor * layout.context,
        "pp": layout.pipeline,
        "dp": layout.data,
        "dp_cp": layout.data * layout.context,
        "embd": min(layout.pipeline, 2),
        "mp": tensor * layout.pipeline,
        "ep": layout.expert,
        "etp": layout.expert_tensor,
        "tp_ep": experts,
        "tp_ep_pp": experts * layout.pipeline,
        "expt_dp": layout.expert_data,
        "dist_opt": world,
        "world": world,
    }[group]


def make_collective(
    layout: Layout, kind: Kind, group: Group, count: int, size: float, purpose: Purpose
) -> Collective:
    """`count` calls a step of `size` bytes each, in a group of the layout."""
    return Collective(
        kind=kind,
        group=group,
        num_ranks=group_size(layout, group),
        count=count,
        payload_bytes=size,
        purpose=purpose,
    )
