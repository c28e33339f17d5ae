"""Sets up the project's own implementations in a worker process."""

from dataclasses import dataclass, field

import torch

from megatron.trainer.config.schema import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron.trainer.runtime.launch import RunContext, initialize
from moe_ext.config import MoEModelConfig
from moe_ext.experts import AUTO, EXPERT_BACKENDS, choose_backend, use_of_model


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(RunConfig):
    """Extends the run config with a model, like the application's config."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)
    """The architecture."""


def usable_backends(model: MoEModelConfig, device_type: str, dtype: torch.dtype) -> list[str]:
    """List the expert backends that can compute the model here; `auto` selects the first.

    Args:
        model: the architecture, on one rank.
        device_type: "cpu" or "cuda".
        dtype: of the matrix products.
    """
    use = use_of_model(model, device_type=device_type, dtype=dtype, tensor=1, expert_tensor=1)
    first = choose_backend(AUTO, use).name
    others = [name for name, each in EXPERT_BACKENDS.items() if each.problem(use) is None]
    return [first, *(name for name in others if name != first)]


def start(
    model: MoEModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_length: int,
    micro_batch_size: int,
    learning_rate: float,
) -> tuple[BenchmarkConfig, RunContext]:
    """Build a run config and its context: device, process groups of one rank, current threads.

    Args:
        model: the architecture.
        device: the CPU or the visible GPU.
        dtype: bf16 trains with fp32 master weights, as the trainer does.
        seq_length: s.
        micro_batch_size: b; one micro-batch is the global batch.
        learning_rate: constant.
    """
    cfg = BenchmarkConfig(
        model=model,
        parallel=ParallelConfig(device=device.type, threads_per_rank=torch.get_num_threads()),  # type: ignore[arg-type]
        training=TrainingConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size,
            seq_length=seq_length,
            bf16=dtype == torch.bfloat16,
        ),
        optimizer=OptimizerConfig(
            lr=learning_rate,
            min_lr=learning_rate,
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_warmup_init=learning_rate,
        ),
        data=DataConfig(mock_data=True),
    )
    return cfg, initialize(cfg)
