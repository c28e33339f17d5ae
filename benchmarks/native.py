"""What the project's own implementations start from, in the worker's process."""

from dataclasses import dataclass, field

import torch

from megatron.trainer.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron.trainer.launch import RunContext, initialize
from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(RunConfig):
    """A run with a model, as tools put it together."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)
    """The architecture."""


def start(
    model: MoEModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_length: int,
    micro_batch_size: int,
    learning_rate: float,
) -> tuple[BenchmarkConfig, RunContext]:
    """A run config and its context: device, process groups of one rank, threads as they are set.

    Args:
        model: the architecture.
        device: the CPU, or the GPU that is visible.
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
