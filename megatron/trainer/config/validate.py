"""Checks that the settings of a run fit together and suit the number of ranks; never edits them."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from megatron.trainer.config.batch_plan import rampup_problems
from megatron.trainer.config.durations import branch_problems, length_problems
from megatron.trainer.config.near_names import did_you_mean
from megatron.trainer.config.parallel_layout import (
    data_parallel_size,
    nearest_multiples,
    resolved_expert_tensor_parallel_size,
    resolved_sequence_parallel,
    world_size_problems,
)
from megatron.trainer.config.schedule_lengths import schedule_problems
from megatron.trainer.config.schema import (
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron.trainer.config.validate_reliability import (
    checkpoint_problems,
    profiling_problems,
    reliability_problems,
)
from megatron.trainer.errors import ConfigError

MOE_ACT = "moe_act"
"""The gated activation between an expert's two products."""

RECOMPUTE_MODULES = ("core_attn", "moe", MOE_ACT)
"""Modules that selective recomputation supports, by megatron-core's names.

megatron-core 0.16 also has `layernorm`, which needs Transformer Engine.
"""


_MOST_READ_AHEAD = 1024
"""Global batches."""
_LARGEST_SEED = 1 << 62


@runtime_checkable
class ModelGroup(Protocol):
    """Declares what the trainer needs from an application's `model` group."""

    @property
    def num_layers(self) -> int:
        """Return the number of transformer layers."""

    def problems(self) -> list[str]:
        """List the problems of the model settings on their own, one message each."""

    def layout_problems(
        self,
        *,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        virtual_stages: int,
        expert_model_parallel_size: int,
        expert_tensor_parallel_size: int,
        sequence_parallel: bool,
        seq_length: int,
        is_training: bool,
    ) -> list[str]:
        """List what prevents this parallel layout; called only if `problems` found none."""


def validate(cfg: RunConfig, world_size: int, *, is_training: bool = True) -> None:
    """Reject a run that cannot work, listing all of its problems at once.

    Args:
        cfg: a run config with a `model` group, see `ModelGroup`.
        world_size: ranks in the run.
        is_training: False for runs without a backward pass.

    Raises:
        ConfigError: one line per problem.
        TypeError: `cfg` has no such model group; a bug of the application.
    """
    model = getattr(cfg, "model", None)
    if not isinstance(model, ModelGroup):
        raise TypeError(
            f"{type(cfg).__name__}.model is {model!r}, which lacks num_layers, problems() or"
            " layout_problems(); give the run config a model group with all three"
        )
    found_sizes = size_problems(cfg)
    model_problems = model.problems()
    found = _non_finite_problems(cfg) + found_sizes + model_problems
    # The remaining checks divide by the sizes, so these must be positive.
    if not found_sizes:
        found += _sequence_problems(cfg.parallel)
        found += _context_problems(cfg.parallel, cfg.training)
        found += _interleaving_problems(cfg.parallel)
        found += _gather_problems(cfg.parallel)
        world_problems = world_size_problems(cfg.parallel, world_size)
        found += world_problems
        if not world_problems:
            found += _batch_problems(cfg.training, cfg.parallel, world_size)
        found += length_problems(cfg)
        if not model_problems:
            found += _model_layout_problems(model, cfg, is_training=is_training)
    found += _recompute_module_problems(cfg.training)
    found += _optimizer_problems(cfg.optimizer)
    found += schedule_problems(cfg.optimizer, cfg)
    found += checkpoint_problems(cfg.checkpoint) + branch_problems(cfg)
    found += reliability_problems(cfg.reliability, cfg.checkpoint)
    found += profiling_problems(cfg, world_size)
    if not model_problems:
        found += cfg.own_problems()
    if cfg.logging.wandb_project is not None and cfg.checkpoint.save is None:
        found.append(
            f"wandb_project ({cfg.logging.wandb_project!r}) needs save (None), because the run's"
            " id is kept in the run directory; set --save DIR, or drop --wandb-project"
        )
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        lines = "".join(f"\n- {problem}" for problem in found)
        raise ConfigError(f"{len(found)} settings are wrong:{lines}")


def _non_finite_problems(cfg: RunConfig) -> list[str]:
    found = []
    for group in dataclasses.fields(cfg):
        values = getattr(cfg, group.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{field.name} ({value}) must be finite; use an ordinary number")
    return found


def size_problems(cfg: RunConfig) -> list[str]:
    """List the sizes and counts that are below their minimum, one message each."""
    parallel, training = cfg.parallel, cfg.training
    at_least_one: dict[str, int | None] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "num_virtual_stages_per_pipeline_rank": parallel.num_virtual_stages_per_pipeline_rank,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "distributed_timeout_minutes": parallel.distributed_timeout_minutes,
        "threads_per_rank": parallel.threads_per_rank,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "seq_length": training.seq_length,
        "train_iters": training.train_iters,
        "recompute_num_layers": training.recompute_num_layers,
        "eval_iters": cfg.evaluation.eval_iters,
        "eval_tasks_limit": cfg.evaluation.eval_tasks_limit,
        "keep_last": cfg.checkpoint.keep_last,
        "keep_every": cfg.checkpoint.keep_every,
        "exit_interval": cfg.reliability.exit_interval,
        "spike_window": cfg.reliability.spike_window,
        "log_interval": cfg.logging.log_interval,
    }
    at_least_zero: dict[str, int | None] = {
        "seed": training.seed,
        "num_workers": cfg.data.num_workers,
        "eval_interval": cfg.evaluation.eval_interval,
        "eval_documents": cfg.evaluation.eval_documents,
        "ckpt_step": cfg.checkpoint.ckpt_step,
        "save_interval": cfg.checkpoint.save_interval,
        "max_skipped": cfg.reliability.max_skipped,
        "max_rewinds": cfg.reliability.max_rewinds,
    }
    found = [
        f"seed ({training.seed}) must be at most 2^62; use a smaller one"
        for _ in range(training.seed > _LARGEST_SEED)
    ]
    found += [
        f"num_workers ({cfg.data.num_workers}) must be at most {_MOST_READ_AHEAD} global batches;"
        " use a few"
        for _ in range(cfg.data.num_workers > _MOST_READ_AHEAD)
    ]
    found += [
        f"{name} ({value}) must be at least {least}; use {least} or more"
        for least, values in ((1, at_least_one), (0, at_least_zero))
        for name, value in values.items()
        if value is not None and value < least
    ]
    return found + (rampup_problems(training, 1) if training.global_batch_size >= 1 else [])


def _sequence_problems(parallel: ParallelConfig) -> list[str]:
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel is not True or tensor > 1:
        return []
    return [
        f"sequence_parallel (True) needs tensor_model_parallel_size ({tensor}) above 1, because it"
        " splits the sequence over the tensor parallel ranks; drop --sequence-parallel, or use a"
        " tensor parallel size of 2 or more"
    ]


def _context_problems(parallel: ParallelConfig, training: TrainingConfig) -> list[str]:
    context, length = parallel.context_parallel_size, training.seq_length
    tensor = parallel.tensor_model_parallel_size if resolved_sequence_parallel(parallel) else 1
    step = context * math.lcm(2, tensor)
    if context == 1 or length % step == 0:
        return []
    return [
        f"seq_length ({length}) must be a multiple of {step}, because context_parallel_size"
        f" ({context}) gives each rank an early and a late chunk of every sequence"
        + (f", which sequence_parallel splits over {tensor} more ranks" if tensor > 1 else "")
        + f"; use a sequence length of {nearest_multiples(length, step)}"
    ]


def _interleaving_problems(parallel: ParallelConfig) -> list[str]:
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    pipeline = parallel.pipeline_model_parallel_size
    if virtual == 1 or pipeline > 1:
        return []
    return [
        f"num_virtual_stages_per_pipeline_rank ({virtual}) needs pipeline_model_parallel_size"
        f" ({pipeline}) above 1, because it interleaves pipeline stages; use 1 virtual stage, or a"
        " pipeline parallel size of 2 or more"
    ]


def _gather_problems(parallel: ParallelConfig) -> list[str]:
    if not parallel.overlap_param_gather:
        return []
    needed = {
        "use_distributed_optimizer": "every rank updates all weights otherwise",
        "overlap_grad_reduce": "weights are gathered in the buckets that gradients are reduced in",
    }
    return [
        f"overlap_param_gather (True) needs {name} (False), because {why}; set"
        f" --{name.replace('_', '-')}, or drop --overlap-param-gather"
        for name, why in needed.items()
        if not getattr(parallel, name)
    ]


def _batch_problems(
    training: TrainingConfig, parallel: ParallelConfig, world_size: int
) -> list[str]:
    micro, batch = training.micro_batch_size, training.global_batch_size
    data = data_parallel_size(parallel, world_size)
    pipeline = parallel.pipeline_model_parallel_size
    is_interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    legal_step = micro * data * (pipeline if is_interleaved else 1)
    remedy = f"use a global batch size of {nearest_multiples(batch, legal_step)}"
    if batch % (micro * data):
        return [
            f"global_batch_size ({batch}) must be a multiple of micro_batch_size x data parallel"
            f" size ({micro} x {data} = {micro * data}); {remedy}"
        ]
    if batch % legal_step:
        return [
            f"global_batch_size ({batch}) gives each data parallel rank {batch // (micro * data)}"
            " micro-batches, which num_virtual_stages_per_pipeline_rank"
            f" ({parallel.num_virtual_stages_per_pipeline_rank}) requires in multiples of"
            f" pipeline_model_parallel_size ({pipeline}); {remedy}"
        ]
    return rampup_problems(training, legal_step)


def _model_layout_problems(model: ModelGroup, cfg: RunConfig, *, is_training: bool) -> list[str]:
    parallel = cfg.parallel
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    found = model.layout_problems(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline,
        virtual_stages=virtual,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=resolved_expert_tensor_parallel_size(parallel),
        sequence_parallel=resolved_sequence_parallel(parallel),
        seq_length=cfg.training.seq_length,
        is_training=is_training,
    )
    if model.num_layers % (pipeline * virtual) == 0:
        found += _recompute_layer_problems(cfg.training, model.num_layers // (pipeline * virtual))
    return found


def _recompute_layer_problems(training: TrainingConfig, num_layers: int) -> list[str]:
    """Check `recompute_num_layers` against the `num_layers` of one model chunk."""
    count = training.recompute_num_layers
    if training.recompute_granularity != "full":
        return []
    if training.recompute_method == "block" and count > num_layers:
        return [
            f"recompute_num_layers ({count}) must be at most the layers of a pipeline stage"
            f" ({num_layers}) with recompute_method block; use 1 to {num_layers}"
        ]
    if training.recompute_method == "uniform" and num_layers % count:
        # Otherwise megatron-core indexes past the last layer.
        choices = [str(size) for size in range(1, num_layers + 1) if num_layers % size == 0]
        return [
            f"recompute_num_layers ({count}) must divide the layers of a pipeline stage"
            f" ({num_layers}) with recompute_method uniform; use one of {', '.join(choices)}"
        ]
    return []


def _recompute_module_problems(training: TrainingConfig) -> list[str]:
    known = ", ".join(RECOMPUTE_MODULES)
    if training.recompute_granularity == "selective" and not training.recompute_modules:
        return [
            "recompute_modules (none) must name a module when recompute_granularity is"
            f" selective; use any of {known}"
        ]
    found = []
    for name in training.recompute_modules:
        if name not in RECOMPUTE_MODULES:
            hint = did_you_mean(name, RECOMPUTE_MODULES)
            found.append(
                f"recompute_modules has an unknown name ({name!r}){hint or ';'} use any of {known}"
            )
    return found


def _optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    found = [
        f"{name} ({value}) must be above 0; use a positive number"
        for name, value in (("lr", optimizer.lr), ("adam_eps", optimizer.adam_eps))
        if value <= 0
    ]
    found += [
        f"{name} ({value}) must be at least 0 and below 1; use 0.9 or 0.95, for example"
        for name, value in (
            ("adam_beta1", optimizer.adam_beta1),
            ("adam_beta2", optimizer.adam_beta2),
            ("rmsprop_alpha", optimizer.rmsprop_alpha),
        )
        if not 0 <= value < 1
    ]
    found += [
        f"{name} ({value}) must not be negative; use 0 to switch it off"
        for name, value in (
            ("weight_decay", optimizer.weight_decay),
            ("clip_grad", optimizer.clip_grad),
        )
        if value < 0
    ]
    return found
