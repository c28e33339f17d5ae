"""Predict the peak memory of a rank in a training step, in bytes, from configs alone.

    peak = weights + gradients + optimizer state + buffers
           + the most, over the moments of a step, of kept activations and workspace

The workspace is estimated, the rest is counted: `tests/distributed/test_plan_measured.py` compares
it with real runs. Left out is what belongs to no tensor: the process, the CUDA context, NCCL, and
memory lost to fragmentation.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_ext.config import MoEModelConfig
from moe_ext.cost.activations import Step, StepRank, head_gradient, micro_batch
from moe_ext.cost.collective import Group, group_size
from moe_ext.cost.param_shards import Chunk, Layout, bucket_limit, bucket_sizes
from moe_ext.cost.workspace import (
    head_backward,
    head_forward,
    layer_workspace,
    recomputed_activations,
)

_FP32, _INT64, _BOOL = 4, 8, 1


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """Counts the bytes a rank holds between steps."""

    weights: int
    """Parameters, in the precision of compute."""
    gradients: int
    """fp32 buffers."""
    optimizer: int
    """Both moments, and with bf16 the fp32 master weights."""
    largest: int
    """Elements of the largest part of a parameter that the rank updates."""
    buffers: int
    """The gathered-sequence buffer, the dispatchers' routing tensors, the step's batch."""

    @property
    def total(self) -> int:
        """Return the sum of weights, gradients, optimizer state and buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Describes the memory of a rank at its peak, in bytes."""

    stage: int
    """Pipeline stage."""
    state: ModelState
    """Held between steps."""
    activations: float
    """Kept for later backward passes."""
    workspace: float
    """Temporary tensors at the peak."""
    moment: str
    """The part of the step that peaks."""

    @property
    def peak(self) -> float:
        """Return the total at the peak."""
        return self.state.total + self.activations + self.workspace


def footprint(model: MoEModelConfig, layout: Layout, step: Step) -> Footprint:
    """Predict the footprint of the stage with the highest peak."""
    found = [stage_footprint(model, layout, step, stage=stage) for stage in range(layout.pipeline)]
    return max(found, key=lambda each: each.peak)


def stage_footprint(model: MoEModelConfig, layout: Layout, step: Step, *, stage: int) -> Footprint:
    """Predict the footprint of a rank of pipeline stage `stage`, counted from 0."""
    rank = StepRank(model=model, layout=layout, batch=step, stage=stage)
    state = model_state(rank)
    kept = peak_activations(rank)
    moments: list[tuple[str, float, float]] = []
    in_layers = kept
    if rank.chunks[-1].has_head:
        moments.append(("head forward", kept, head_forward(rank)))
        moments.append(("head backward", kept, head_backward(rank)))
        in_layers = kept - head_gradient(rank)
    recomputed = recomputed_activations(rank)
    moments.append(("layer backward", in_layers + recomputed, layer_workspace(rank)))
    moments.append(("gradient reduction", 0.0, float(_reduction_copy(rank))))
    moments.append(("optimizer", 0.0, float(state.largest * _FP32)))
    moment, activations, workspace = max(moments, key=lambda each: each[1] + each[2])
    return Footprint(
        stage=stage, state=state, activations=activations, workspace=workspace, moment=moment
    )


def model_state(rank: StepRank) -> ModelState:
    """Count what the rank holds between steps.

    Under the distributed optimizer each rank owns an equal part of each bucket, padding included;
    the last rank's part may be padding and have less state.
    """
    is_sharded = rank.batch.use_distributed_optimizer
    of_state = 2 * _FP32 + (_FP32 if rank.batch.bf16 else 0)
    numel = owned = largest = 0
    for buffer, group, largest_shard in _buffers(rank):
        ranks = group_size(rank.layout, group) if is_sharded else 1
        numel += sum(buffer)
        owned += sum(size // ranks for size in buffer)
        largest = max(largest, min(largest_shard, max(buffer) // ranks))
    return ModelState(
        weights=numel * rank.width,
        gradients=numel * _FP32,
        optimizer=owned * of_state,
        largest=largest,
        buffers=_gather_buffer(rank) + _dispatcher_tensors(rank) + _batch_tensors(rank),
    )


def _buffers(rank: StepRank) -> Iterator[tuple[list[int], Group, int]]:
    """Yield each megatron-core buffer's bucket sizes, reduction group and largest parameter."""
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
                yield sizes, group, max(shard.numel for shard in shards)


def _gather_buffer(rank: StepRank) -> int:
    """Return the bytes of the one buffer in which megatron-core gathers split sequences."""
    model, sizes = rank.model, [0]
    has_column_linear = (
        model.attention_experts is None
        or model.num_experts is None
        or model.moe_shared_expert_intermediate_size is not None
    )
    if rank.is_split and has_column_linear:
        sizes.append(rank.tokens)
    is_distributed = rank.layout.expert * rank.layout.expert_tensor > 1
    if is_distributed and model.moe_token_dispatcher_type == "allgather":
        sizes.append(rank.own_tokens * rank.layout.expert * rank.layout.expert_tensor)
    return max(sizes) * model.hidden_size * rank.width


def _dispatcher_tensors(rank: StepRank) -> int:
    """Return the bytes of the last micro-batch's routing that each layer's dispatcher keeps."""
    experts = rank.model.num_experts
    if experts is None or rank.layout.expert * rank.layout.expert_tensor == 1:
        return 0
    if rank.model.moe_token_dispatcher_type != "alltoall":
        return 0
    return rank.num_layers * rank.own_tokens * experts * (_FP32 + _BOOL)


def _batch_tensors(rank: StepRank) -> int:
    """Return the bytes of tokens, labels, positions and loss weights of all micro-batches."""
    rows = rank.batch.seq_length * rank.batch.micro_batch_size * rank.batch.num_microbatches
    num_bytes = rows * (2 * _INT64 + _FP32)
    return num_bytes + (num_bytes // rank.layout.context if rank.layout.context > 1 else 0)


def peak_activations(rank: StepRank) -> float:
    """Return the most bytes kept at any time by all micro-batches in flight."""
    each = [micro_batch(rank, chunk) + _boundary_activations(rank, chunk) for chunk in rank.chunks]
    return max(
        sum(number * each[index] for index, number in counts.items())
        for counts in in_flight(rank.layout, rank.batch.num_microbatches, stage=rank.stage)
    )


def _boundary_activations(rank: StepRank, chunk: Chunk) -> int:
    """Return the bytes the schedule holds of a micro-batch: what a chunk sent and what it received.

    What was received is the input of the first norm. A CPU keeps an fp32 copy of that beside it.
    """
    hidden = rank.own_tokens * rank.model.hidden_size * rank.width
    step = rank.batch
    keeps_fp32_copy = step.device_type == "cpu" and step.bf16 and step.recompute != "full"
    received = 0 if chunk.has_embedding or not keeps_fp32_copy else hidden
    return received + (0 if chunk.has_head else hidden)


def in_flight(layout: Layout, num_microbatches: int, *, stage: int) -> Sequence[Counter[int]]:
    """Count the micro-batches of each chunk that wait for their backward pass, over a step.

    Follows megatron-core's schedules: 1F1B, where an earlier stage is ahead by one micro-batch for
    each stage after it, and the interleaved one.
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
    # The pattern repeats after this many passes.
    for done in range(min(passes - ahead, 2 * group * chunks)):
        counts = counts.copy()
        counts[(done + ahead) // group % chunks] += 1
        found.append(counts.copy())
        counts[chunks - 1 - done // group % chunks] -= 1
    return found


def _reduction_copy(rank: StepRank) -> int:
    """Return the bytes of the copy that Gloo reduce-scatters; NCCL works in place."""
    if rank.batch.device_type == "cuda" or not rank.batch.use_distributed_optimizer:
        return 0
    shared = [sizes for sizes, group, _ in _buffers(rank) if group_size(rank.layout, group) > 1]
    return max((max(sizes) for sizes in shared), default=0) * _FP32
