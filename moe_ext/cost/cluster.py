"""How long a step would take on many GPUs: a model on paper, with rates that the reader chooses.

Nothing overlaps, every rank is as busy as the mean one (dispatch and experts: as the busiest), and
a collective takes its bytes over the slowest link it must cross, plus a constant.
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
"""What the purposes of collectives are summed up as."""
_IN_BUBBLE = ("compute", "dispatch", "tensor", "context")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Rates of a cluster of nodes."""

    flops_per_second: float
    """What a GPU reaches in this model's products."""
    intra_bytes_per_second: float
    """One way, out of a GPU, to others of its node."""
    inter_bytes_per_second: float
    """One way, out of a GPU's network adapter, to other nodes."""
    gpus_per_node: int = 8
    """Ranks of a node are neighbours in number."""
    latency_s: float = 2e-5
    """Of one call, whatever its size."""


def ranks_on_node(layout: Layout, group: Group, gpus_per_node: int) -> int:
    """How many ranks of a group share a node.

    megatron-core numbers ranks by TP, then CP, DP and PP; for experts by ETP, EP, expert data
    parallel rank and PP. So the ranks of a group are a stride apart.
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
        # Of the ranks of these groups, the ones on this stage are neighbours.
        "mp": layout.tensor,
        "tp_ep_pp": experts,
    }.get(group, group_size(layout, group))
    return max(1, min(number, gpus_per_node // max(1, stride)))


def call_seconds(collective: Collective, cluster: Cluster, layout: Layout) -> float:
    """Of one call.

    * all-to-all: what goes to ranks of the node and what goes elsewhere move at the same time.
    * ring: each rank sends its part over the node's links; where the group spans nodes, the ring
      leaves a node through the adapters of all its ranks there.
    * a message takes one link; waiting for it is the pipeline's bubble, so receiving is free.
    """
    if collective.kind == "receive":
        return 0.0
    near = ranks_on_node(layout, collective.group, cluster.gpus_per_node)
    number, size = collective.num_ranks, collective.wire_bytes
    intra, inter = cluster.intra_bytes_per_second, cluster.inter_bytes_per_second
    if collective.kind == "all_to_all":
        part = collective.payload_bytes / number
        seconds = max((near - 1) * part / intra, (number - near) * part / inter)
    elif number <= near:
        seconds = size / intra
    elif collective.kind == "send" or near == 1:
        seconds = size / inter
    else:
        seconds = max(size / intra, size / (near * inter))
    return seconds + cluster.latency_s


def compute_flops(model: MoEModelConfig, batch: Batch) -> float:
    """Of a token's forward and backward pass on the busiest rank, recomputation included."""
    whole = training_flops_per_token(model, batch.seq_length)
    experts = 0.0
    if model.num_experts is not None:
        matrices = 3 * model.hidden_size * model.moe_ffn_hidden_size
        experts = 6.0 * model.num_layers * model.moe_router_topk * matrices
    again = {"full": whole, "moe": experts, None: 0.0}[batch.recompute] / 3
    return whole + (batch.imbalance - 1) * experts + again


def step_seconds(
    model: MoEModelConfig, layout: Layout, batch: Batch, cluster: Cluster, *, stage: int = 0
) -> dict[str, float]:
    """A step's time in terms that add up: compute, each of `TERMS`, and the pipeline's bubble."""
    collectives = step_collectives(model, layout, batch, stage=stage)
    tokens = batch.seq_length * batch.micro_batch_size * batch.num_microbatches
    shared = layout.tensor * layout.context * layout.pipeline
    found = {"compute": tokens * compute_flops(model, batch) / shared / cluster.flops_per_second}
    for term, purposes in TERMS.items():
        found[term] = sum(
            each.count * call_seconds(each, cluster, layout)
            for each in of_purposes(collectives, purposes)
        )
    waiting = (layout.pipeline - 1) / (layout.virtual_stages * batch.num_microbatches)
    found["bubble"] = waiting * sum(found[term] for term in _IN_BUBBLE)
    return found


def of_purposes(collectives: Sequence[Collective], purposes: Sequence[Purpose]) -> list[Collective]:
    """Those that serve one of the purposes."""
    return [each for each in collectives if each.purpose in purposes]
