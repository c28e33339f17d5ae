"""Estimate the time of a step on many GPUs: an analytic model with rates chosen by the reader.

Nothing overlaps, every rank is as busy as the average one (dispatch and experts: as the busiest),
and a collective moves its bytes over the slowest link it must cross, plus a constant latency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_ext.config import MoEModelConfig
from moe_ext.cost.collective import Collective, Group, Purpose, group_size
from moe_ext.cost.param_shards import Layout
from moe_ext.cost.traffic import Batch, step_collectives
from moe_ext.counting import training_flops_per_token

TERMS: Mapping[str, tuple[Purpose, ...]] = {
    "dispatch": ("dispatch_sizes", "dispatch", "combine"),
    "gradients": ("gradients", "parameters"),
    "tensor": ("attention", "qk_norm", "feed_forward", "router", "embedding", "head"),
    "context": ("context",),
    "pipeline": ("pipeline",),
    "scalars": ("grad_norm", "loss"),
}
"""The purposes of collectives that each term of `step_seconds` sums up."""
_IN_BUBBLE = ("compute", "dispatch", "tensor", "context")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Holds the rates of a cluster of nodes."""

    flops_per_second: float
    """What a GPU reaches in this model's matrix products."""
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


def compute_flops(model: MoEModelConfig, batch: Batch) -> float:
    """Return the FLOPs of a token, forward and backward with recomputation, on the busiest rank."""
    total = training_flops_per_token(model, batch.seq_length)
    experts = shared = 0.0
    if model.num_experts is not None:
        column = 6.0 * model.num_layers * 3 * model.hidden_size
        experts = column * model.moe_router_topk * model.moe_ffn_hidden_size
        shared = column * (model.moe_shared_expert_intermediate_size or 0)
    again = {"full": total, "moe": experts + shared, None: 0.0}[batch.recompute] / 3
    return total + (batch.imbalance - 1) * experts + again


def step_seconds(
    model: MoEModelConfig, layout: Layout, batch: Batch, cluster: Cluster, *, stage: int = 0
) -> dict[str, float]:
    """Estimate the seconds of a step as a sum: compute, each of `TERMS`, the pipeline bubble."""
    collectives = step_collectives(model, layout, batch, stage=stage)
    tokens = batch.seq_length * batch.micro_batch_size * batch.num_microbatches
    shared = layout.tensor * layout.context * layout.pipeline
    found = {"compute": tokens * compute_flops(model, batch) / shared / cluster.flops_per_second}
    for term, purposes in TERMS.items():
        found[term] = sum(
            each.count * collective_seconds(each, cluster, layout)
            for each in select_purposes(collectives, purposes)
        )
    waiting = (layout.pipeline - 1) / (layout.virtual_stages * batch.num_microbatches)
    found["bubble"] = waiting * sum(found[term] for term in _IN_BUBBLE)
    return found


def select_purposes(
    collectives: Sequence[Collective], purposes: Sequence[Purpose]
) -> list[Collective]:
    """Return the collectives that serve one of the purposes."""
    return [each for each in collectives if each.purpose in purposes]
