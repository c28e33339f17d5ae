"""Estimate the time of a step on many GPUs, from what was measured on one and the links' rates.

Every rank is as busy as the average one (dispatch and experts: as the busiest), and a collective
moves its bytes over the slowest link it must cross, plus a constant latency. Only the reduction of
gradients and the gathering of weights overlap with compute, and only where the run's flags say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_ext.config import MoEModelConfig
from moe_ext.cost.collective import Collective, Group, Purpose, group_size
from moe_ext.cost.compute import micro_batch_seconds, update_seconds
from moe_ext.cost.device import Device
from moe_ext.cost.param_shards import Layout
from moe_ext.cost.rank import Batch, Rank
from moe_ext.cost.traffic import step_collectives

TERMS: Mapping[str, tuple[Purpose, ...]] = {
    "dispatch": ("dispatch_sizes", "dispatch", "combine"),
    "gradients": ("gradients", "parameters"),
    "tensor": ("attention", "qk_norm", "feed_forward", "router", "embedding", "head"),
    "context": ("context",),
    "pipeline": ("pipeline",),
    "scalars": ("grad_norm", "loss"),
}
"""The purposes of collectives that each term of `step_seconds` sums up."""
_IN_BUBBLE = ("dispatch", "tensor", "context")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Holds the rates of a cluster of nodes."""

    device: Device
    """The GPU."""
    intra_bytes_per_second: float
    """One way, from a GPU to the others of its node."""
    inter_bytes_per_second: float
    """One way, from a GPU's network adapter to other nodes."""
    gpus_per_node: int = 8
    """A node holds consecutive ranks."""
    latency_s: float = 2e-5
    """Of one call, whatever its size."""


def ranks_on_node(layout: Layout, group: Group, gpus_per_node: int) -> int:
    """Return how many ranks of a group share a node.

    megatron-core numbers ranks by TP, then CP, DP and PP; for experts by ETP, EP, expert data
    parallel rank and PP. So the ranks of a group lie at a constant stride.
    """
    tensor, experts = layout.tensor, layout.expert_tensor * layout.expert
    stage = group_size(layout, "world") // layout.pipeline
    stride = {
        "cp": tensor,
        "dp": tensor * layout.context,
        "dp_cp": tensor,
        "ep": layout.expert_tensor,
        "expt_dp": experts,
        "pp": stage,
        "embd": stage * (layout.pipeline - 1),
    }.get(group, 1)
    number = {
        # Only the ranks of these groups that are on this stage are contiguous.
        "mp": layout.tensor,
        "tp_ep_pp": experts,
    }.get(group, group_size(layout, group))
    return max(1, min(number, gpus_per_node // max(1, stride)))


def collective_seconds(collective: Collective, cluster: Cluster, layout: Layout) -> float:
    """Estimate the seconds of one call.

    * all-to-all: traffic within the node and to other nodes moves at the same time.
    * ring: each rank sends its part over the node's links; where the group spans nodes, the ring
      leaves a node through the adapters of all its ranks there.
    * a message takes one link; waiting for it is the pipeline bubble, so receiving is free.
    """
    if collective.kind == "receive":
        return 0.0
    on_node = ranks_on_node(layout, collective.group, cluster.gpus_per_node)
    number, size = collective.num_ranks, collective.wire_bytes
    intra, inter = cluster.intra_bytes_per_second, cluster.inter_bytes_per_second
    if collective.kind == "all_to_all":
        part = collective.payload_bytes / number
        seconds = max((on_node - 1) * part / intra, (number - on_node) * part / inter)
    elif number <= on_node:
        seconds = size / intra
    elif collective.kind == "send" or on_node == 1:
        seconds = size / inter
    else:
        seconds = max(size / intra, size / (on_node * inter))
    return seconds + cluster.latency_s


def step_seconds(
    model: MoEModelConfig, layout: Layout, batch: Batch, cluster: Cluster, *, stage: int = 0
) -> dict[str, float]:
    """Estimate the seconds of a step as a sum: compute, each of `TERMS`, and what else takes time.

    Gradients are what of their reduction, and of gathering weights, is not hidden; the bubble is
    the wait of a pipeline stage for the others; waits are those of the GPU for the host.
    """
    rank = Rank(model=model, layout=layout, batch=batch, stage=stage)
    collectives = step_collectives(model, layout, batch, stage=stage)
    once = micro_batch_seconds(rank, cluster.device)
    found = {"compute": batch.num_microbatches * once.total}
    for term, purposes in TERMS.items():
        found[term] = sum(
            each.count * collective_seconds(each, cluster, layout)
            for each in select_purposes(collectives, purposes)
        )
    backward, forward = 2 / 3 * once.total, 1 / 3 * once.total
    if batch.overlap_grad_reduce:
        reductions = select_purposes(collectives, ("gradients",))
        found["gradients"] -= _hidden_seconds(rank, reductions, cluster, backward)
    if batch.overlap_param_gather:
        gathers = select_purposes(collectives, ("parameters",))
        found["gradients"] -= _hidden_seconds(rank, gathers, cluster, forward)
    waiting = (layout.pipeline - 1) / (layout.virtual_stages * batch.num_microbatches)
    in_layers = batch.num_microbatches * (once.layers + once.accumulation)
    found["bubble"] = waiting * (in_layers + sum(found[term] for term in _IN_BUBBLE))
    found["optimizer"] = update_seconds(rank, cluster.device)
    found["waits"] = cluster.device.waits_ms / 1e3
    return found


def _hidden_seconds(
    rank: Rank, collectives: Sequence[Collective], cluster: Cluster, under: float
) -> float:
    """Return the seconds of collectives that hide under a pass of `under` seconds.

    Reductions hide under the last backward pass, gathers under the first forward pass. A bucket is
    reduced once backward has been through its layers, and gathered before forward comes to them.
    The first stage ends last and begins first: its last buckets, of its first layers, have nothing
    to hide under. Another stage has the passes of the stages before it.
    """
    seconds: dict[Group, list[float]] = {"dp_cp": [], "expt_dp": []}
    for each in collectives:
        if each.group in seconds:
            seconds[each.group].append(collective_seconds(each, cluster, rank.layout))
    everything = sum(map(sum, seconds.values()))
    if rank.stage > 0:
        return min(everything, rank.stage * under / rank.layout.virtual_stages)
    last = sum(each[-1] for each in seconds.values() if each)
    return min(everything - last, under)


def select_purposes(
    collectives: Sequence[Collective], purposes: Sequence[Purpose]
) -> list[Collective]:
    """Return the collectives that serve one of the purposes."""
    return [each for each in collectives if each.purpose in purposes]
