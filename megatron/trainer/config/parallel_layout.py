"""Computes group sizes from the parallel settings and the number of ranks."""

from dataclasses import dataclass

from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Holds the size of every kind of group, with all defaults resolved."""

    tensor: int
    """Ranks that share an attention or embedding matrix (TP)."""
    pipeline: int
    """Pipeline stages (PP)."""
    virtual_stages: int
    """Model chunks per pipeline rank."""
    context: int
    """Ranks that share each sequence (CP)."""
    expert: int
    """Ranks a layer's experts are spread over (EP)."""
    expert_tensor: int
    """Ranks that share each expert's matrices (ETP)."""
    data: int
    """Ranks that hold the same dense parameters and read different samples (DP)."""
    expert_data: int
    """Ranks that hold the same experts."""
    sequence_parallel: bool
    """Whether activations are split along the sequence outside the matrices."""


def world_size_problems(parallel: ParallelConfig, world_size: int) -> list[str]:
    """List what prevents `world_size` ranks from forming the groups, one message each.

    Args:
        parallel: sizes, each at least 1.
        world_size: ranks in the run.
    """
    tensor = parallel.tensor_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    expert = parallel.expert_model_parallel_size
    expert_tensor = resolved_expert_tensor_parallel_size(parallel)
    found = []
    if world_size % (tensor * pipeline * context):
        sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        if context > 1:
            sizes["context_parallel_size"] = context
        found.append(_indivisible_world(world_size, sizes))
    if world_size % (expert_tensor * expert * pipeline):
        found.append(
            _indivisible_world(
                world_size,
                {
                    "expert_tensor_parallel_size": expert_tensor,
                    "expert_model_parallel_size": expert,
                    "pipeline_model_parallel_size": pipeline,
                },
            )
        )
    return found


def resolve_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """Compute the size of every group.

    Raises:
        ConfigError: the ranks cannot be divided into these groups.
    """
    found = world_size_problems(parallel, world_size)
    if found:
        raise ConfigError("\n".join(found))
    pipeline = parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    expert_tensor = resolved_expert_tensor_parallel_size(parallel)
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=pipeline,
        virtual_stages=parallel.num_virtual_stages_per_pipeline_rank,
        context=parallel.context_parallel_size,
        expert=expert,
        expert_tensor=expert_tensor,
        data=data_parallel_size(parallel, world_size),
        expert_data=world_size // (expert_tensor * expert * pipeline),
        sequence_parallel=resolved_sequence_parallel(parallel),
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Count the ranks that read different samples; TP x PP x CP must divide `world_size`."""
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def resolved_expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Return the expert tensor parallel size, by default the tensor parallel size."""
    if parallel.expert_tensor_parallel_size is None:
        return parallel.tensor_model_parallel_size
    return parallel.expert_tensor_parallel_size


def resolved_sequence_parallel(parallel: ParallelConfig) -> bool:
    """Return whether activations are split along the sequence, by default when TP > 1."""
    if parallel.sequence_parallel is None:
        return parallel.tensor_model_parallel_size > 1
    return parallel.sequence_parallel


def num_microbatches(training: TrainingConfig, layout: Layout) -> int:
    """Count the micro-batches of a data parallel rank in a step; exact for validated configs."""
    return training.global_batch_size // (training.micro_batch_size * layout.data)


def nearest_multiples(number: int, step: int) -> str:
    """Format the multiples of `step` just below and above `number`, without 0: "8 or 12"."""
    below = number - number % step
    return f"{below} or {below + step}" if below else f"{step}"


def _indivisible_world(world_size: int, sizes: dict[str, int]) -> str:
    product = 1
    for size in sizes.values():
        product *= size
    values = " x ".join(str(size) for size in sizes.values())
    return (
        f"the number of ranks ({world_size}) must be a multiple of {' x '.join(sizes)}"
        f" ({values} = {product}); start {nearest_multiples(world_size, product)} ranks, or change"
        " these sizes"
    )
