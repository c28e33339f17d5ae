"""Wraps a model for training: precision, data parallelism, optimizer, callbacks."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.trainer.config.schema import RunConfig
from megatron.trainer.optim.adamw import build_optimizer
from megatron.trainer.optim.groups import GroupRates
from megatron.trainer.optim.param_gather import wait_before_forward
from megatron.trainer.optim.update import copy_weights_at_once


def wrap_model(
    cfg: RunConfig, chunks: list[torch.nn.Module], transformer_config: TransformerConfig
) -> list[DistributedDataParallel]:
    """Wrap model chunks for mixed precision, gradient reduction and the gathering of weights.

    Gradients are averaged over data parallel ranks and reduced in fp32. Interleaved stages gather
    their chunks' weights at the same time, when the schedule says so; others as they need them.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        overlap_param_gather=cfg.parallel.overlap_param_gather,
        align_param_gather=len(chunks) > 1,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(transformer_config, chunk) if cfg.training.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                transformer_config, ddp_config, module, disable_bucketing=index > 0
            )
        )
        if cfg.parallel.overlap_param_gather:
            wait_before_forward(wrapped[-1])
    return wrapped


def prepare_training(
    cfg: RunConfig,
    chunks: list[DistributedDataParallel],
    transformer_config: TransformerConfig,
    *,
    rates: Sequence[GroupRates] = (),
) -> ChainedOptimizer:
    """Build the optimizer and hand megatron-core's schedules their callbacks."""
    optimizer = build_optimizer(
        cfg.optimizer,
        list(chunks),
        bf16=cfg.training.bf16,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        rates=rates,
    )
    copy_weights_at_once(optimizer)
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.grad_scale_func = optimizer.scale_loss
    if cfg.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        start_sync = [chunk.start_grad_sync for chunk in chunks]
        single = len(chunks) == 1
        transformer_config.no_sync_func = no_sync[0] if single else no_sync
        if not single:
            transformer_config.grad_sync_func = start_sync
            if cfg.parallel.overlap_param_gather:
                transformer_config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    return optimizer
