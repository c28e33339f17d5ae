"""Models a training step on 8 to 1,024 GPUs: bytes, collectives, compute and time."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.errors import ConfigError
from moe_ext.config import MoEModelConfig
from moe_ext.cost.cluster import TERMS, Cluster, select_purposes, step_seconds
from moe_ext.cost.collective import Collective
from moe_ext.cost.rank import Batch
from moe_ext.cost.traffic import step_collectives

SEQUENCES, SEQ_LENGTH = 1024, 4096
"""OLMoE's global batch: 4,194,304 tokens."""
EXCHANGES = tuple(TERMS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Holds the varied and the fixed settings of the table."""

    model: MoEModelConfig
    """The architecture."""
    gpus: Sequence[int]
    """Ranks in the run."""
    expert: Sequence[int]
    """Expert parallel sizes; skipped where they do not divide the number of ranks."""
    tensor: int
    """TP; ETP is 1."""
    pipeline: int
    """PP."""
    context: int
    """CP."""
    micro_batch_size: int
    """Sequences per micro-batch, fewer where a rank has fewer."""
    imbalance: float
    """Assignments of the busiest expert parallel rank over the mean."""
    cluster: Cluster
    """Rates of compute and communication."""


def rows(run: Run) -> list[dict[str, Any]]:
    """Describe every number of GPUs with every expert parallel size that divides it."""
    return [
        describe(run, layout, batch)
        for num_gpus in run.gpus
        for expert in run.expert
        for layout, batch in fitting(run, num_gpus, expert)
    ]


def fitting(run: Run, num_gpus: int, expert: int) -> Iterator[tuple[Layout, Batch]]:
    """Yield the layout and a rank's share of the global batch, nothing if they do not divide."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=run.tensor,
        pipeline_model_parallel_size=run.pipeline,
        context_parallel_size=run.context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
    )
    try:
        layout = resolve_layout(parallel, num_gpus)
    except ConfigError:
        return
    sequences, rest = divmod(SEQUENCES, layout.data)
    if rest or not sequences:
        return
    micro_batch_size = min(run.micro_batch_size, sequences)
    yield (
        layout,
        Batch(
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro_batch_size,
            num_microbatches=sequences // micro_batch_size,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            imbalance=run.imbalance,
        ),
    )


def describe(run: Run, layout: Layout, batch: Batch) -> dict[str, Any]:
    """Compute counts, bytes and seconds of a step on a rank of the first pipeline stage."""
    collectives = step_collectives(run.model, layout, batch)
    seconds = step_seconds(run.model, layout, batch, run.cluster)
    bytes_of = {term: _bytes(select_purposes(collectives, TERMS[term])) for term in EXCHANGES}
    num_gpus = layout.tensor * layout.context * layout.data * layout.pipeline
    routed = batch.seq_length * batch.micro_batch_size * batch.num_microbatches
    routed //= layout.tensor * layout.context  # tokens routed by this rank
    total = sum(seconds.values())
    return {
        "gpus": num_gpus,
        "layout": dataclasses.asdict(layout),
        "batch": dataclasses.asdict(batch),
        "collectives": sum(each.count for each in collectives if each.kind != "receive"),
        "tokens": routed,
        "dispatch_bytes_per_token_and_layer": bytes_of["dispatch"]
        / routed
        / (run.model.num_layers // layout.pipeline),
        "bytes": bytes_of,
        "seconds": seconds,
        "step_seconds": total,
        "compute_share": seconds["compute"] / total,
        "largest": max(seconds, key=lambda term: seconds[term]),
        "largest_exchange": max(EXCHANGES, key=lambda term: seconds[term]),
        "tokens_per_second_and_gpu": SEQUENCES * batch.seq_length / total / num_gpus,
    }


def _bytes(collectives: Sequence[Collective]) -> float:
    return sum(each.step_bytes for each in collectives)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format a Markdown table, a row per entry."""
    lines = [
        "| GPUs | EP | DP | micro-batches | dispatch: KB a token and layer | dispatch: GB |"
        " gradients and parameters: GB | collectives | compute: ms | dispatch: ms |"
        " gradients: ms | rest: ms | compute's share | largest exchange |",
        "|" + "---:|" * 13 + "---|",
    ]
    for row in found:
        seconds, layout, batch = row["seconds"], row["layout"], row["batch"]
        rest = row["step_seconds"] - sum(
            seconds[term] for term in ("compute", "dispatch", "gradients")
        )
        lines.append(
            f"| {row['gpus']:,} | {layout['expert']} | {layout['data']} |"
            f" {batch['num_microbatches']} x {batch['micro_batch_size']} |"
            f" {row['dispatch_bytes_per_token_and_layer'] / 1e3:.1f} |"
            f" {row['bytes']['dispatch'] / 1e9:.1f} | {row['bytes']['gradients'] / 1e9:.2f} |"
            f" {row['collectives']:,} | {1e3 * seconds['compute']:.0f} |"
            f" {1e3 * seconds['dispatch']:.0f} | {1e3 * seconds['gradients']:.0f} |"
            f" {1e3 * rest:.1f} | {row['compute_share']:.0%} | {row['largest_exchange']} |"
        )
    return "\n".join(lines)


def assumptions(run: Run) -> str:
    """Describe the assumptions of the table."""
    cluster, device = run.cluster, run.cluster.device
    gpu = device.name
    if device.layer_ms:
        gpu += f", experts as '{device.backend(run.model.expert_backend)}'"
    intra, inter = cluster.intra_bytes_per_second, cluster.inter_bytes_per_second
    return (
        f"{SEQUENCES:,} sequences of {SEQ_LENGTH:,} tokens a step, TP {run.tensor}, PP"
        f" {run.pipeline}, CP {run.context}, ETP 1, bf16, distributed optimizer; {gpu}; a GPU"
        f" sends {intra / 1e9:g} GB/s within its node of {cluster.gpus_per_node} and"
        f" {inter / 1e9:g} GB/s out of it;"
        f" {1e6 * cluster.latency_s:g} us a call; the busiest expert parallel rank gets"
        f" {run.imbalance:g} times the mean. Gradients are reduced under the backward pass."
    )
