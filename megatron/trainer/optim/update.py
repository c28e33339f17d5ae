"""Does what an update needs beside its arithmetic, without a wait of the host for each tensor.

megatron-core does the same a tensor at a time where neither Transformer Engine nor Apex is
installed: it reads the norm of every gradient, multiplies each by the clip factor, and copies each
weight.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron.trainer.compat import gradients_for_norm
from megatron.trainer.optim.adamw import AdamW

_EPSILON = 1e-6
"""Added to the norm that gradients are clipped by, as in `clip_grad_by_total_norm_fp32`."""


@torch.no_grad()
def squared_norms(optimizer: ChainedOptimizer, device: torch.device) -> Tensor:
    """Sum the squares of all gradients over the ranks that hold them; a collective call.

    Args:
        optimizer: after `prepare_grads`.
        device: of this rank.

    Returns:
        [n] float32 on the device: a sum for each group of ranks that some parameters are spread
        over, the same on every rank. `norm_of` makes the norm of it.
    """
    held: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for inner in optimizer.chained_optimizers:
        group = inner.get_grad_stats_parallel_group()
        held.setdefault(group, []).extend(gradients_for_norm(inner))
    squares = []
    for group, gradients in held.items():
        norm = get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        square = norm.float().square()
        dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares)


def norm_of(squares: Sequence[float]) -> float:
    """Return the norm of gradients whose `squared_norms` these are."""
    norms = [math.sqrt(square) for square in squares]
    # As megatron-core adds those of its optimizers, to the last bit.
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def clip_gradients(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clip the prepared gradients to the norm `clip_grad`.

    Our AdamW divides them in the pass of its update; for others megatron-core multiplies them in a
    pass of its own.

    Args:
        optimizer: after `prepare_grads`; with a `clip_grad` of 0 its gradients stay as they are.
        norm: of the gradients of all chained optimizers over all ranks.
    """
    for inner in optimizer.chained_optimizers:
        parameters, limit = inner.get_parameters(), inner.config.clip_grad
        if not parameters or limit <= 0.0:
            continue
        if isinstance(inner.optimizer, AdamW) and inner.optimizer.takes_grad_scale:
            divisor = (norm + _EPSILON) / limit
            if divisor > 1.0:
                # Filled on the device: copying a number there would wait for all work before it.
                inner.optimizer.grad_scale = torch.full(
                    (), divisor, dtype=torch.float32, device=parameters[0].device
                )
        else:
            clip_grad_by_total_norm_fp32(parameters, limit, norm)


def copy_weights_at_once(optimizer: ChainedOptimizer) -> None:
    """Make mixed-precision optimizers copy their fp32 weights to the model's in one call."""
    for inner in optimizer.chained_optimizers:
        if isinstance(inner, MixedPrecisionOptimizer):
            _copy_at_once(inner)


def _copy_at_once(inner: Any) -> None:
    """Replace the method of an optimizer that copies a tensor at a time.

    Both lists are views of the memory that stays: the model's weights, or this rank's part of them.
    fp32 weights of the model are what the optimizer updates, and need no copy.
    """

    def copy() -> None:
        if not inner.is_stub_optimizer:
            ours, theirs = inner._get_model_and_main_params_data_float16()
            if ours:
                torch._foreach_copy_(ours, theirs)

    inner._copy_main_params_to_model_params = copy
