"""List what one rank exchanges with others in one training step, from configs alone.

Each part of the model and of the step has a function that lists its collectives.
`tests/distributed/test_traffic.py` compares them with real runs on gloo, call by call and byte by
byte.
"""

from collections.abc import Callable, Iterator

from moe_ext.config import MoEModelConfig
from moe_ext.cost.collective import Collective, Group, Purpose, group_size
from moe_ext.cost.param_shards import Layout, bucket_limit, bucket_sizes, head_widths
from moe_ext.cost.rank import Batch, Rank
from moe_ext.layers.head import tokens_per_chunk

_FP32, _INT64, _FP64, _BOOL = 4, 8, 8, 1


def step_collectives(
    model: MoEModelConfig, layout: Layout, batch: Batch, *, stage: int = 0
) -> list[Collective]:
    """List every collective of one training step of a rank on pipeline stage `stage`, from 0.

    Groups of one rank are left out: they move nothing. All ranks of a stage do the same.

    Raises:
        ValueError: the traffic of the model's dispatcher or routing is not known.
    """
    if model.has_varying_experts:
        raise ValueError(
            f"router '{model.router}' with moe_expert_capacity_factor"
            f" {model.moe_expert_capacity_factor} gives tokens unequal numbers of experts, whose"
            " memory and traffic are not modelled; plan with softmax_topk and no capacity"
        )
    rank = Rank(model=model, layout=layout, batch=batch, stage=stage)
    found = [
        *layers(rank),
        *embedding(rank),
        *head(rank),
        *pipeline(rank),
        *gradients(rank),
        *tied_embedding(rank),
        *split_sequence_gradients(rank),
        *optimizer(rank),
        *expert_biases(rank),
        *loss(rank),
    ]
    return [each for each in found if each.num_ranks > 1 and each.count > 0]


def layers(rank: Rank) -> Iterator[Collective]:
    """List the collectives of all layers of this rank."""
    model = rank.model
    if model.attention_experts is not None:
        yield from moa(rank, experts=model.attention_experts)
    else:
        passes = rank.forward_passes("attention")
        yield from column_linear(rank, "attention", passes=passes)
        yield from row_linear(rank, "attention", passes=passes)
        if model.attention == "full_width_qk_norm":
            yield from qk_norm(rank)
    yield from context_parallel(rank)
    if model.num_experts is None:
        passes = rank.forward_passes("attention")
        yield from column_linear(rank, "feed_forward", passes=passes)
        yield from row_linear(rank, "feed_forward", passes=passes)
    else:
        yield from router_counts(rank, experts=model.num_experts)
        yield from dispatcher(rank, experts=model.num_experts)
        if model.moe_shared_expert_intermediate_size is not None:
            passes = rank.forward_passes("experts")
            yield from column_linear(rank, "feed_forward", passes=passes)
            yield from row_linear(rank, "feed_forward", passes=passes)


def column_linear(rank: Rank, purpose: Purpose, *, passes: int) -> Iterator[Collective]:
    """List those of a column-parallel matrix: its input is gathered, and again for backward."""
    runs, size = rank.layer_runs, rank.hidden_bytes
    if rank.is_split:
        yield rank.call("all_gather", "tp", runs * (passes + 1), size, purpose)
        yield rank.call("reduce_scatter", "tp", runs, size, purpose)
    else:
        yield rank.call("all_reduce", "tp", runs, size, purpose)


def row_linear(rank: Rank, purpose: Purpose, *, passes: int) -> Iterator[Collective]:
    """List those of a row-parallel matrix: its outputs are summed."""
    runs, size = rank.layer_runs, rank.hidden_bytes
    if rank.is_split:
        yield rank.call("reduce_scatter", "tp", runs * passes, size, purpose)
        yield rank.call("all_gather", "tp", runs, size, purpose)
    else:
        yield rank.call("all_reduce", "tp", runs * passes, size, purpose)


def qk_norm(rank: Rank) -> Iterator[Collective]:
    """List those of the query and key norms: one sum per token each, forward and backward.

    LayerNorm has two, one after the other forward and together backward.
    """
    runs, passes, size = 2 * rank.layer_runs, rank.forward_passes("attention"), rank.tokens * _FP32
    if rank.model.has_norm_weights:
        yield rank.call("all_reduce", "tp", runs * (passes + 1), size, "qk_norm")
        return
    yield rank.call("all_reduce", "tp", runs * passes * 2, size, "qk_norm")
    yield rank.call("all_reduce", "tp", runs, 2 * size, "qk_norm")


def moa(rank: Rank, *, experts: int) -> Iterator[Collective]:
    """List those of moa: every rank has some heads of all experts, and needs all tokens."""
    runs, passes = rank.layer_runs, rank.forward_passes("attention")
    slots = rank.tokens * rank.model.attention_topk
    yield from router_counts(rank, experts=experts)
    if rank.is_split:
        yield rank.call("all_gather", "tp", runs * passes, slots * _INT64, "attention")
        for size in (rank.hidden_bytes, slots * _FP32):  # hidden states, gates
            yield rank.call("all_gather", "tp", runs * passes, size, "attention")
            yield rank.call("reduce_scatter", "tp", runs, size, "attention")
    else:
        for size in (rank.hidden_bytes, slots * _FP32):
            yield rank.call("all_reduce", "tp", runs, size, "attention")
    yield from row_linear(rank, "attention", passes=passes)


def context_parallel(rank: Rank) -> Iterator[Collective]:
    """List the all-gather of keys and values, and the reduce-scatter of their gradients."""
    keys = head_widths(rank.model)[1] // rank.layout.tensor
    size = rank.batch.seq_length * rank.batch.micro_batch_size * 2 * keys * rank.width
    passes = rank.forward_passes("attention")
    yield rank.call("all_gather", "cp", rank.layer_runs * passes, size, "context")
    yield rank.call("reduce_scatter", "cp", rank.layer_runs, size, "context")


def router_counts(rank: Rank, *, experts: int) -> Iterator[Collective]:
    """List those of tokens per expert: of a micro-batch, and of all ranks' for a global loss."""
    group: Group = "tp_cp" if rank.layout.sequence_parallel else "cp"
    loss, size = rank.model.moe_router_load_balancing_type, experts * _INT64
    sequences = rank.batch.micro_batch_size if loss == "seq_aux_loss" else 1
    yield rank.call("all_reduce", group, rank.layer_runs, sequences * size, "router")
    if loss == "global_aux_loss":
        yield rank.call("all_reduce", "dp", rank.layer_runs, size, "router")


def dispatcher(rank: Rank, *, experts: int) -> Iterator[Collective]:
    """List those that move tokens to expert ranks and back; none where a rank holds all experts."""
    if rank.layout.expert * rank.layout.expert_tensor == 1:
        return
    dispatchers: dict[str, Callable[..., Iterator[Collective]]] = {
        "alltoall": alltoall_dispatcher,
        "allgather": allgather_dispatcher,
    }
    kind = rank.model.moe_token_dispatcher_type
    if kind not in dispatchers:
        raise ValueError(
            f"moe_token_dispatcher_type is '{kind}', whose traffic is inside its own kernels; use"
            f" {' or '.join(dispatchers)}"
        )
    yield from dispatchers[kind](rank, experts=experts)


def alltoall_dispatcher(rank: Rank, *, experts: int) -> Iterator[Collective]:
    """List those of the all-to-all dispatcher: rows and gates, then shared by ETP ranks.

    Under ETP megatron-core sums the results in the gates' precision, fp32, whatever the model's.
    """
    runs, passes = rank.layer_runs, rank.forward_passes("experts")
    shared = rank.layout.expert_tensor
    rows = rank.own_tokens * rank.model.moe_router_topk * rank.batch.imbalance
    h = rank.model.hidden_size
    hidden, gates, exact = rows * h * rank.width, rows * _FP32, rows * h * _FP32
    sizes = experts * _INT64 * shared * rank.layout.expert
    yield rank.call("all_gather", "tp_ep", runs * passes, sizes, "dispatch_sizes")
    for size in (hidden, gates):
        yield rank.call("all_to_all", "ep", runs * (passes + 1), size, "dispatch")
        yield rank.call("all_gather", "etp", runs * passes, shared * size, "dispatch")
        yield rank.call("reduce_scatter", "etp", runs, shared * size, "dispatch")
    yield rank.call("reduce_scatter", "etp", runs * passes, shared * exact, "combine")
    yield rank.call("all_gather", "etp", runs, shared * exact, "combine")
    yield rank.call("all_to_all", "ep", runs * (passes + 1), hidden, "combine")


def allgather_dispatcher(rank: Rank, *, experts: int) -> Iterator[Collective]:
    """List those of the all-gather dispatcher: all tokens, gates and routing; fp32 sums back."""
    runs, passes = rank.layer_runs, rank.forward_passes("experts")
    tokens = rank.own_tokens * rank.layout.expert * rank.layout.expert_tensor
    h = rank.model.hidden_size
    yield rank.call("all_gather", "tp_ep", runs * passes, tokens * experts * _BOOL, "dispatch")
    for size in (tokens * experts * _FP32, tokens * h * rank.width):
        yield rank.call("all_gather", "tp_ep", runs * passes, size, "dispatch")
        yield rank.call("reduce_scatter", "tp_ep", runs, size, "dispatch")
    yield rank.call("reduce_scatter", "tp_ep", runs * passes, tokens * h * _FP32, "combine")
    yield rank.call("all_gather", "tp_ep", runs, tokens * h * _FP32, "combine")


def embedding(rank: Rank) -> Iterator[Collective]:
    """List the reduction of the embedding lookup, whose rows are split over TP ranks."""
    if not rank.chunks[0].has_embedding:
        return
    count, size = rank.batch.num_microbatches, rank.hidden_bytes
    if rank.is_split:
        yield rank.call("reduce_scatter", "tp", count, size, "embedding")
        yield rank.call("all_gather", "tp", count, size, "embedding")
    else:
        yield rank.call("all_reduce", "tp", count, size, "embedding")


def head(rank: Rank) -> Iterator[Collective]:
    """List those of output layer and cross-entropy: hidden states, and two sums per token chunk."""
    if not rank.chunks[-1].has_head:
        return
    count, size = rank.batch.num_microbatches, rank.hidden_bytes
    if rank.is_split:
        yield rank.call("all_gather", "tp", count, size, "head")
        yield rank.call("reduce_scatter", "tp", count, size, "head")
    else:
        yield rank.call("all_reduce", "tp", count, size, "head")
    rows = rank.model.padded_vocab_size // rank.layout.tensor
    largest = tokens_per_chunk(rank.tokens, rows, rank.batch.device_type)
    full_chunks, remainder = divmod(rank.tokens, largest)
    for number, tokens in ((full_chunks, largest), (1 if remainder else 0, remainder)):
        for values in (1, 2):  # max logit; then sum of exponentials and label logit
            yield rank.call("all_reduce", "tp", count * number, values * tokens * _FP32, "head")


def pipeline(rank: Rank) -> Iterator[Collective]:
    """List the sends and receives of hidden states between chunks, and of their gradients."""
    size = rank.own_tokens * rank.model.hidden_size * rank.width
    behind = sum(not chunk.has_embedding for chunk in rank.chunks)
    ahead = sum(not chunk.has_head for chunk in rank.chunks)
    count = (behind + ahead) * rank.batch.num_microbatches
    yield rank.call("send", "pp", count, size, "pipeline")
    yield rank.call("receive", "pp", count, size, "pipeline")


def gradients(rank: Rank) -> Iterator[Collective]:
    """List the gradient reductions, and the parameter gathers of the distributed optimizer.

    Experts and the other parameters have separate optimizers, and each of the two distributed
    optimizers gathers all parameters, its own or not: everything moves twice, unless modules ask
    for their weights.
    """
    is_sharded = rank.batch.use_distributed_optimizer
    is_gathered_once = rank.batch.overlap_param_gather or rank.model.num_experts is None
    groups: tuple[tuple[Group, bool], ...] = (("dp_cp", False), ("expt_dp", True))
    for chunk in rank.chunks:
        for group, is_expert in groups:
            buckets = bucket_sizes(
                [shard for shard in chunk.shards if shard.is_expert == is_expert],
                num_ranks=group_size(rank.layout, group),
                is_sharded=is_sharded,
                limit=bucket_limit(
                    chunk, rank.layout, stage=rank.stage,
                    is_overlapped=rank.batch.overlap_grad_reduce,
                ),
            )  # fmt: skip
            if chunk.index > 0:
                buckets = [sum(buckets)]  # later chunks reduce all buckets in one call
            for numel in filter(None, buckets):
                if not is_sharded:
                    yield rank.call("all_reduce", group, 1, numel * _FP32, "gradients")
                    continue
                yield rank.call("reduce_scatter", group, 1, numel * _FP32, "gradients")
                size = numel * rank.width
                yield rank.call(
                    "all_gather", group, 1 if is_gathered_once else 2, size, "parameters"
                )


def tied_embedding(rank: Rank) -> Iterator[Collective]:
    """List the all-reduce of the embedding's gradient with its copy on the last stage."""
    for chunk in rank.chunks:
        for shard in chunk.shards:
            if shard.is_tied and rank.layout.pipeline > 1:
                yield rank.call("all_reduce", "embd", 1, shard.numel * _FP32, "gradients")


def split_sequence_gradients(rank: Rank) -> Iterator[Collective]:
    """List the one all-reduce for gradients of parameters replicated over TP ranks."""
    if rank.is_split:
        shards = [shard for chunk in rank.chunks for shard in chunk.shards]
        numel = sum(shard.numel for shard in shards if shard.is_split_sequence)
        if numel:
            yield rank.call("all_reduce", "tp", 1, numel * _FP32, "gradients")


def optimizer(rank: Rank) -> Iterator[Collective]:
    """List the all-reduces of the gradient norm."""
    if rank.batch.use_distributed_optimizer:
        yield rank.call("all_reduce", "dist_opt", 1, _FP32, "grad_norm")
        return
    yield rank.call("all_reduce", "mp", 1, _FP32, "grad_norm")
    if rank.model.num_experts is not None:
        yield rank.call("all_reduce", "tp_ep_pp", 1, _FP32, "grad_norm")


def expert_biases(rank: Rank) -> Iterator[Collective]:
    """List the one all-reduce of a step's loads, which the biases of experts move by."""
    if rank.model.moe_router_enable_expert_bias:
        experts = (rank.model.num_experts or 0) + (rank.model.attention_experts or 0)
        yield rank.call("all_reduce", "dp", 1, rank.num_layers * experts * _INT64, "router")


def loss(rank: Rank) -> Iterator[Collective]:
    """List those of the loss: the token count before the step, loss sum and count after it."""
    yield rank.call("all_reduce", "dp", 1, _FP64, "loss")
    yield rank.call("all_reduce", "world", 1, 2 * _FP64, "loss")
