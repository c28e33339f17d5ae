"""Gathers updated weights under the forward pass (`--overlap-param-gather`).

The distributed optimizer leaves each rank with the weights that it updated. megatron-core's DDP can
gather the others' bucket by bucket while the first layers of the next forward pass compute; a hook
of each module waits for the weights that the module itself has. Blocks here read weights of modules
below them without calling those, so that a module waits for all weights below it, too. Only what
holds a list of layers does not: its layers do. With `--moe-share-across-layers` megatron-core warns
that a bucket was gathered before it was asked for, and waits all the same.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn


def wait_before_forward(chunk: DistributedDataParallel) -> None:
    """Let every module that holds no list of layers wait for all weights that are below it.

    A module that reads a weight beside or above it has to call that weight's module.

    Args:
        chunk: wrapped with `overlap_param_gather`.
    """
    for module in chunk.module.modules():
        if not any(isinstance(each, nn.ModuleList) for each in module.modules()):
            module.register_forward_pre_hook(_waiting(chunk, module), prepend=True)


def _waiting(
    chunk: DistributedDataParallel, top: nn.Module
) -> Callable[[nn.Module, tuple[object, ...]], None]:
    """Return a hook that waits, in the order in which the buckets are gathered."""
    is_aligned = chunk.ddp_config.align_param_gather
    groups = dict.fromkeys(
        chunk.param_to_bucket_group[weight]
        for weight in top.parameters()
        if weight in chunk.param_to_bucket_group
    )

    def wait(_module: nn.Module, _inputs: tuple[object, ...]) -> None:
        for group in groups:
            group.finish_param_sync(skip_next_bucket_dispatch=is_aligned)

    return wait


def finish_param_gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Make all weights the updated ones; a collective call while they are being gathered.

    For whoever reads or writes weights without a forward pass. Nothing happens twice, and nothing
    where weights are not gathered under forward passes.
    """
    for chunk in chunks:
        assert isinstance(chunk, DistributedDataParallel)
        if not chunk.ddp_config.overlap_param_gather:
            continue
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)
