"""Describe a collective by kind, group and bytes, and compute what it sends over the wire."""

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
    """Describes a collective that a rank calls a number of times per step."""

    kind: Kind
    """The operation; a send and a receive are one message each."""
    group: Group
    """The process group."""
    num_ranks: int
    """Ranks of that group."""
    count: int
    """Calls per step."""
    payload_bytes: float
    """Of one call: the tensor reduced, the gathered result, the tensor scattered, the input of an
    all-to-all (the rank's own part included), or a message."""
    purpose: Purpose
    """The part of the step that calls it."""

    @property
    def wire_bytes(self) -> float:
        """Return the bytes this rank sends per call: ring algorithms, pairwise for all-to-all."""
        others = (self.num_ranks - 1) / self.num_ranks
        factors = {"all_reduce": 2 * others, "send": 1.0, "receive": 0.0}
        return factors.get(self.kind, others) * self.payload_bytes

    @property
    def step_bytes(self) -> float:
        """Return the bytes this rank sends per step."""
        return self.count * self.wire_bytes


def group_size(layout: Layout, group: Group) -> int:
    """Return the number of ranks in a group of the layout."""
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
    """Build a collective of `count` calls per step, of `size` bytes each."""
    return Collective(
        kind=kind,
        group=group,
        num_ranks=group_size(layout, group),
        count=count,
        payload_bytes=size,
        purpose=purpose,
    )
