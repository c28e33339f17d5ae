"""Bytes of memory that a rank needs at the highest moment of a training step, from configs alone.

    peak = weights + gradients + optimizer state + buffers
           + the most, over the moments of a step, of kept activations and working memory

Working memory is estimated, the rest is counted: `tests/distributed/test_plan_measured.py` holds it
to real runs. Left out is what belongs to no tensor: the process, CUDA's context, NCCL, and what an
allocator cannot use because it lies in pieces.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_ext.config import MoEModelConfig
from moe_ext.cost.activations import Step, StepRank, head_gradient, micro_batch
from moe_ext.cost.collective import Group, group_size
from moe_ext.cost.param_shards import Chunk, Layout, bucket_limit, bucket_sizes
from moe_ext.cost.workspace import head_backward, head_forward, layer_workspace, recomputed

_FP32, _INT64, _BOOL = 4, 8, 1


@dataclass(frozen=True, kw_only=True)
class State:
    """What a rank holds between steps."""

    weights: int
    """Parameters, in the precision they are computed with."""
    gradients: int
    """fp32 buffers."""
    optimizer: int
    """Both moments, and with bf16 the fp32 master weights."""
    largest: int
    """Numbers of the largest piece of a parameter that the rank updates."""
    buffers: int
    """Gathered sequences, the routing that dispatchers remember, the step's tokens."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A rank at the highest moment of its step; bytes."""

    stage: int
    """Its pipeline stage."""
    state: State
    """What is there between steps."""
    activations: float
    """What is kept for backward passes to come."""
    workspace: float
    """Tensors that exist only then."""
    moment: str
    """When that is."""

    @property
    def peak(self) -> float:
        """All of it."""
        return self.state.total + self.activations + self.workspace


def footprint(model: MoEModelConfig, layout: Layout, step: Step) -> Footprint:
    """The rank with the highest peak."""
    found = [stage_footprint(model, layout, step, stage=stage) for stage in range(layout.pipeline)]
    return max(found, key=lambda each: each.peak)


def stage_footprint(model: MoEModelConfig, layout: Layout, step: Step, *, stage: int) -> Footprint:
    """A rank of pipeline stage `stage`, from 0."""
    rank = StepRank(model=model, layout=layout, batch=step, stage=stage)
    state = state_of(rank)
    kept = kept_activations(rank)
    moments: list[tuple[str, float, float]] = []
    in_layers = kept
    if rank.chunks[-1].has_head:
        moments.append(("head forward", kept, head_forward(rank)))
        moments.append(("head backward", kept, head_backward(rank)))
        in_layers = kept - head_gradient(rank)
    again = recomputed(rank)
    moments.append(("layer backward", in_layers + again, layer_workspace(rank)))
    moments.append(("gradient reduction", 0.0, float(_reduction(rank))))
    moments.append(("optimizer", 0.0, float(state.largest * _FP32)))
    moment, activations, workspace = max(moments, key=lambda each: each[1] + each[2])
    return Footprint(
        stage=stage, state=state, activations=activations, workspace=workspace, moment=moment
    )


def state_of(rank: StepRank) -> State:
    """What the rank holds between steps.

    Under the distributed optimizer each rank owns an equal part of each bucket, padding included;
    the last one's part may hold the padding and less state.
    """
    is_sharded = rank.batch.use_distributed_optimizer
    of_state = 2 * _FP32 + (_FP32 if rank.batch.bf16 else 0)
    numbers = owned = largest = 0
    for buffer, group, biggest in _buffers(rank):
        ranks = group_size(rank.layout, group) if is_sharded else 1
        numbers += sum(buffer)
        owned += sum(size // ranks for size in buffer)
        largest = max(largest, min(biggest, max(buffer) // ranks))
    return State(
        weights=numbers * rank.width,
        gradients=numbers * _FP32,
        optimizer=owned * of_state,
        largest=largest,
        buffers=_gathered(rank) + _routing(rank) + _tokens(rank),
    )


def _buffers(rank: StepRank) -> Iterator[tuple[list[int], Group, int]]:
    """Buckets of each of megatron-core's buffers, who reduces them, and the largest parameter."""
    groups: tuple[tuple[Group, bool], ...] = (("dp_cp", False), ("expt_dp", True))
    for chunk in rank.chunks:
        limit = bucket_limit(
            chunk, rank.layout, stage=rank.stage, is_overlapped=rank.batch.overlap_grad_reduce
        )
        for group, is_expert in groups:
            shards = [shard for shard in chunk.shards if shard.is_expert == is_expert]
            if shards:
                sizes = bucket_sizes(
                    shards,
                    num_ranks=group_size(rank.layout, group),
                    is_sharded=rank.batch.use_distributed_optimizer,
                    limit=limit,
                )
                yield sizes, group, max(shard.numbers for shard in shards)


def _gathered(rank: StepRank) -> int:
    """The one buffer that megatron-core gathers the parts of a sequence in."""
    model, sizes = rank.model, [0]
    if rank.is_split and (model.attention_experts is None or model.num_experts is None):
        sizes.append(rank.tokens)
    is_spread = rank.layout.expert * rank.layout.expert_tensor > 1
    if is_spread and model.moe_token_dispatcher_type == "allgather":
        sizes.append(rank.own_tokens * rank.layout.expert * rank.layout.expert_tensor)
    return max(sizes) * model.hidden_size * rank.width


def _routing(rank: StepRank) -> int:
    """Probabilities and choices of the last micro-batch, which each layer's dispatcher has."""
    experts = rank.model.num_experts
    if experts is None or rank.layout.expert * rank.layout.expert_tensor == 1:
        return 0
    if rank.model.moe_token_dispatcher_type != "alltoall":
        return 0
    return rank.num_layers * rank.own_tokens * experts * (_FP32 + _BOOL)


def _tokens(rank: StepRank) -> int:
    """Tokens, labels, positions and weights of all micro-batches."""
    rows = rank.batch.seq_length * rank.batch.micro_batch_size * rank.batch.num_microbatches
    whole = rows * (2 * _INT64 + _FP32)
    return whole + (whole // rank.layout.context if rank.layout.context > 1 else 0)


def kept_activations(rank: StepRank) -> float:
    """Of all micro-batches that are between their passes at the worst time."""
    each = [micro_batch(rank, chunk) + _borders(rank, chunk) for chunk in rank.chunks]
    return max(
        sum(number * each[index] for index, number in counts.items())
        for counts in in_flight(rank.layout, rank.batch.num_microbatches, stage=rank.stage)
    )


def _borders(rank: StepRank, chunk: Chunk) -> int:
    """What the schedule holds of a micro-batch: what a chunk sent, and what it received.

    What was received is the first norm's input. A CPU keeps that in fp32 beside it.
    """
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    step = rank.batch
    is_apart = step.device_type == "cpu" and step.bf16 and step.recompute != "full"
    received = 0 if chunk.has_embedding or not is_apart else hidden
    return received + (0 if chunk.has_head else hidden)


def in_flight(layout: Layout, num_microbatches: int, *, stage: int) -> Sequence[Counter[int]]:
    """Micro-batches of each chunk that wait for their backward pass, at each time of a step.

    megatron-core's schedules: 1F1B, where an earlier stage is as many micro-batches ahead as there
    are stages behind it, and the interleaved one.
    """
    behind = layout.pipeline - stage - 1
    chunks = layout.virtual_stages
    if chunks == 1:
        return [Counter({0: min(num_microbatches, behind + 1)})]
    group = layout.pipeline
    passes = num_microbatches * chunks
    ahead = min(2 * behind + (chunks - 1) * group, passes)
    counts: Counter[int] = Counter(number // group % chunks for number in range(ahead))
    found = [counts]
    # After so many passes the pattern repeats.
    for done in range(min(passes - ahead, 2 * group * chunks)):
        counts = counts.copy()
        counts[(done + ahead) // group % chunks] += 1
        found.append(counts.copy())
        counts[chunks - 1 - done // group % chunks] -= 1
    return found


def _reduction(rank: StepRank) -> int:
    """Gloo reduces and scatters a copy; NCCL works in place."""
    if rank.batch.device_type == "cuda" or not rank.batch.use_distributed_optimizer:
        return 0
    shared = [sizes for sizes, group, _ in _buffers(rank) if group_size(rank.layout, group) > 1]
    return max((max(sizes) for sizes in shared), default=0) * _FP32
